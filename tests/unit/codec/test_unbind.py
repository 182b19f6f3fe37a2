"""`mini`'s corrector step: what it mends, what it leaves, and its arithmetic against brute force."""

import math

import pytest
import torch

from lvm.codec.mini import MiniConfig, MiniEncoder, MiniHypothesizer, paired, unpaired
from lvm.codec.tokenizer import ChunkTokenizer
from lvm.codec.unbind import NO_TEXT, SOLVED, Unbinder
from lvm.codec.zoo import CODECS

TOY = MiniConfig(
    vocabulary_size=200, max_tokens=10, full_tokens=8, topic_dim=32, lexical_dim=256, d_ff=64, num_heads=4
)
END = 1


@pytest.fixture(scope="module")
def encoder() -> MiniEncoder:
    torch.manual_seed(4)
    return MiniEncoder(TOY).eval()


@pytest.fixture(scope="module")
def unbinder(encoder: MiniEncoder) -> Unbinder:
    hypothesizer = MiniHypothesizer(TOY, encoder.topic_norm).eval()
    return Unbinder(encoder, hypothesizer, [-math.log(200)] * 200, END)


def texts(rows: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, TOY.max_tokens + 1, (rows,), generator=generator).tolist()
    return [
        [*torch.randint(3, TOY.vocabulary_size, (n - 1,), generator=generator).tolist(), END] for n in lengths
    ]


def encode(encoder: MiniEncoder, rows: list[list[int]]) -> torch.Tensor:
    ids = torch.zeros(len(rows), TOY.max_tokens, dtype=torch.int64)
    mask = torch.zeros(len(rows), TOY.max_tokens, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), True
    with torch.inference_mode():
        return encoder(ids, mask)


def spoilt(rows: list[list[int]], wrong: int, seed: int = 9) -> list[list[int]]:
    """Texts with `wrong` of their tokens replaced."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for row in rows:
        row = list(row)
        for place in torch.randperm(len(row) - 1, generator=generator)[:wrong].tolist():
            row[place] = int(torch.randint(3, TOY.vocabulary_size, (1,), generator=generator))
        out.append(row)
    return out


def test_wrong_tokens_are_mended(encoder: MiniEncoder, unbinder: Unbinder) -> None:
    rows = texts(64)
    hypotheses = spoilt(rows, 2)
    assert sum(a == b for a, b in zip(hypotheses, rows, strict=True)) < 5
    again = unbinder.judge(encode(encoder, rows), hypotheses)[0]
    assert sum(a == b for a, b in zip(again, rows, strict=True)) >= 62


def test_a_text_of_the_wrong_length_is_mended(encoder: MiniEncoder, unbinder: Unbinder) -> None:
    rows = [row for row in texts(64) if 5 < len(row) < TOY.max_tokens]
    shorter = [[*row[:-3], END] for row in rows]
    longer = [[*row[:-1], 7, END] for row in rows]
    for hypotheses in (shorter, longer):
        again = unbinder.judge(encode(encoder, rows), hypotheses)[0]
        assert sum(a == b for a, b in zip(again, rows, strict=True)) >= len(rows) - 2


def test_exchanged_tokens_are_put_back(encoder: MiniEncoder, unbinder: Unbinder) -> None:
    rows = [row for row in texts(40, seed=3) if len(row) > 6]
    exchanged = [[row[4], *row[1:4], row[0], *row[5:]] for row in rows]
    x = paired(unbinder._hypothesizer.unscale(encode(encoder, rows)))
    ids = unbinder._swap(x, unbinder._pack(exchanged, x.device))
    assert unbinder._unpack(ids, rows) == rows


def test_a_swap_takes_off_what_brute_force_says_and_the_best_goes_first(
    encoder: MiniEncoder, unbinder: Unbinder
) -> None:
    rows = texts(12, seed=5)
    x = paired(unbinder._hypothesizer.unscale(encode(encoder, rows)))
    before = unbinder._pack(spoilt(texts(12, seed=5), 5), x.device)
    after = unbinder._swap(x, before, most=1)

    def energy(ids: torch.Tensor) -> torch.Tensor:
        return unbinder._left(x, ids).abs().square().sum(1)

    best = energy(before)
    for i in range(TOY.max_tokens):
        for j in range(i):
            swapped = before.clone()
            swapped[:, i], swapped[:, j] = before[:, j], before[:, i]
            best = torch.minimum(best, energy(swapped))
    torch.testing.assert_close(energy(after), best, atol=2e-3, rtol=1e-4)
    assert (energy(after) < energy(before) - 0.01).any()


def test_a_right_text_stays_and_no_text_gets_worse(encoder: MiniEncoder, unbinder: Unbinder) -> None:
    rows = texts(32)
    vectors = encode(encoder, rows)
    assert unbinder.judge(vectors, rows)[0] == rows
    noisy = torch.nn.functional.normalize(vectors + 0.5 * torch.randn(vectors.shape) / 288**0.5, dim=-1)
    x = paired(unbinder._hypothesizer.unscale(noisy))
    hypotheses = spoilt(rows, 3)
    before = unbinder._share(x, unbinder._pack(hypotheses, x.device))
    after = unbinder._share(x, unbinder._pack(unbinder.judge(noisy, hypotheses)[0], x.device))
    assert (after <= before + 1e-6).all()
    assert float(after.mean()) < 0.7 * float(before.mean())
    assert float(before.min()) > SOLVED


def test_a_vector_of_no_text_keeps_its_hypothesis(encoder: MiniEncoder, unbinder: Unbinder) -> None:
    torch.manual_seed(2)
    vectors = torch.nn.functional.normalize(torch.randn(32, TOY.dim), dim=-1)
    hypotheses = spoilt(texts(32), 3)
    x = paired(unbinder._hypothesizer.unscale(vectors))
    first = unbinder._pack(hypotheses, x.device)
    found, hopeful = unbinder._sweep(x, first)
    fitted = unbinder._share(x, found)
    assert (fitted < 0.9 * unbinder._share(x, first)).all()  # words that fit better are easily found
    assert (fitted > NO_TEXT).all()
    assert len(hopeful) == 0  # and so it is left before the last sweep
    assert unbinder.judge(vectors, hypotheses) == (hypotheses, list(range(32)))
    rows = texts(32)
    mended = unbinder.judge(encode(encoder, rows), spoilt(rows, 1))
    assert len(mended[1]) <= 2  # a text's vector is one


def test_leaving_blends_early_takes_no_text_for_one(
    encoder: MiniEncoder, unbinder: Unbinder, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(5)
    rows, noise = texts(96, seed=3), torch.nn.functional.normalize(torch.randn(96, TOY.dim), dim=-1)
    near = torch.linspace(0.8, 1.0, 96)[:, None]
    vectors = near * encode(encoder, rows) + (1 - near**2).sqrt() * noise
    hypotheses = spoilt(rows, 2)
    early = unbinder.judge(vectors, hypotheses)
    monkeypatch.setattr("lvm.codec.unbind.HOPELESS", (2.0, 2.0, 2.0))
    patient = unbinder.judge(vectors, hypotheses)
    texts_taken_for_blends = set(early[1]) - set(patient[1])
    assert len(patient[1]) > 5
    assert len(patient[1]) < 60
    assert len(texts_taken_for_blends) <= 1
    assert sum(a != b for a, b in zip(early[0], patient[0], strict=True)) <= 2


def test_a_batch_is_its_singles(encoder: MiniEncoder, unbinder: Unbinder) -> None:
    rows = texts(12, seed=8)
    vectors, hypotheses = encode(encoder, rows), spoilt(rows, 3)
    alone = [unbinder.judge(v[None], [h])[0][0] for v, h in zip(vectors, hypotheses, strict=True)]
    assert unbinder.judge(vectors, hypotheses)[0] == alone
    assert unbinder.judge(vectors[:0], [])[0] == []


def test_the_tokenizer_gives_the_frequencies() -> None:
    tokenizer = ChunkTokenizer.load(CODECS["mini"] / "tokenizer.json", 32)
    logs = tokenizer.log_frequencies()
    assert len(logs) == tokenizer.vocabulary_size
    assert sum(math.exp(v) for v in logs) == pytest.approx(1.0, abs=0.1)
    (the, rare), _ = tokenizer.encode(["the", "quartz"])
    assert logs[the[0]] > logs[rare[0]] + 3
    assert logs[tokenizer.pad_id] < -20
    assert logs[tokenizer.end_id] == pytest.approx(-math.log(22))


def test_what_follows_each_place_is_foreseen(encoder: MiniEncoder, unbinder: Unbinder) -> None:
    rows = texts(64, seed=3)
    vectors = encode(encoder, rows)
    hypothesizer = MiniHypothesizer(TOY, encoder.topic_norm)
    with torch.inference_mode():
        x = hypothesizer.unscale(vectors)
        foreseen = unpaired(unbinder.foresee(paired(x)))
        embedded = encoder.tokens.weight[
            torch.tensor([row + [0] * (TOY.max_tokens - len(row)) for row in rows])
        ]
        mask = torch.tensor([[t < len(row) for t in range(TOY.max_tokens)] for row in rows])
        bound = encoder.bound(embedded, mask)
    after = bound.flip(1).cumsum(1).flip(1) - bound  # what the places after each hold in truth
    assert foreseen.shape == after.shape
    assert foreseen[:, -1].abs().max() == 0
    nearness = torch.nn.functional.cosine_similarity(foreseen[:, :4], after[:, :4], dim=-1)
    assert nearness.mean() > 0.7
    # The words at a place are no part of what follows it.
    own = torch.nn.functional.cosine_similarity(foreseen[:, :4], bound[:, :4], dim=-1)
    assert own.mean() < 0.4
