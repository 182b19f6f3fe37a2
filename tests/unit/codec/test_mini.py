"""The mini codec's networks, at toy size and in float32."""

import pytest
import torch

from lvm.codec.inverter import hypothesize
from lvm.codec.mini import MiniConfig, MiniEncoder, MiniHypothesizer, Rotation
from lvm.errors import InputError

TOY = MiniConfig(
    vocabulary_size=64,
    max_tokens=10,
    topic_dim=16,
    lexical_dim=32,
    encoder_layers=1,
    decoder_layers=2,
    d_ff=48,
    num_heads=4,
)
END = 1


@pytest.fixture
def networks() -> tuple[MiniEncoder, MiniHypothesizer]:
    torch.manual_seed(3)
    encoder = MiniEncoder(TOY).eval()
    return encoder, MiniHypothesizer(TOY, encoder.topic_norm).eval()


def some_ids(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, TOY.max_tokens + 1, (rows,), generator=generator)
    ids = torch.randint(3, TOY.vocabulary_size, (rows, TOY.max_tokens), generator=generator)
    mask = torch.arange(TOY.max_tokens)[None] < lengths[:, None]
    ids[torch.arange(rows), lengths - 1] = END
    return ids.masked_fill(~mask, 0), mask


def test_rotation_back_undoes_rotation_and_keeps_norms() -> None:
    rotation = Rotation(32, 12, seed=5)
    x = torch.randn(2, 7, 32)
    rotated = rotation(x, first=3)
    torch.testing.assert_close(rotation(rotated, first=3, back=True), x)
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))
    assert not torch.allclose(rotated, x, atol=0.1)


def test_vectors_have_unit_norm_and_do_not_see_padding(
    networks: tuple[MiniEncoder, MiniHypothesizer],
) -> None:
    encoder, _ = networks
    ids, mask = some_ids(5)
    with torch.inference_mode():
        vectors = encoder(ids, mask)
        longest = int(mask[2].sum())
        alone = encoder(ids[2:3, :longest], mask[2:3, :longest])
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(5))
    torch.testing.assert_close(vectors[2:3], alone, atol=1e-5, rtol=1e-5)


def test_order_of_words_changes_the_vector(networks: tuple[MiniEncoder, MiniHypothesizer]) -> None:
    encoder, _ = networks
    ids = torch.tensor([[5, 6, 7, END], [7, 6, 5, END]])
    with torch.inference_mode():
        first, second = encoder(ids, torch.ones_like(ids, dtype=torch.bool))
    assert float(first @ second) < 0.98


def test_topic_share_tells_the_scale_of_the_rest(networks: tuple[MiniEncoder, MiniHypothesizer]) -> None:
    encoder, hypothesizer = networks
    ids, mask = some_ids(4)
    with torch.inference_mode():
        lexical = encoder.bound(encoder.tokens(ids), mask).sum(1)
        torch.testing.assert_close(hypothesizer.unscale(encoder(ids, mask)), lexical, atol=1e-4, rtol=1e-4)


def test_what_is_written_explains_the_whole_vector(networks: tuple[MiniEncoder, MiniHypothesizer]) -> None:
    """After the last token nothing of the lexical part is left: the residual the prior is read from."""
    encoder, hypothesizer = networks
    ids, mask = some_ids(4)
    with torch.inference_mode():
        explained = encoder.bound(encoder.tokens(ids), mask).sum(1)
        left = hypothesizer.unscale(encoder(ids, mask)) - explained
    assert float(left.abs().max()) < 1e-4


def test_teacher_forcing_does_not_peek(networks: tuple[MiniEncoder, MiniHypothesizer]) -> None:
    encoder, hypothesizer = networks
    ids, mask = some_ids(3)
    mask = torch.ones_like(mask)
    changed = ids.clone()
    changed[:, 5] = (changed[:, 5] + 1) % TOY.vocabulary_size
    with torch.inference_mode():
        vectors = encoder(ids, mask)
        before, after = (hypothesizer(vectors, i, mask, encoder) for i in (ids, changed))
    torch.testing.assert_close(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 6], after[:, 6], atol=1e-3)


def test_step_by_step_equals_teacher_forcing(networks: tuple[MiniEncoder, MiniHypothesizer]) -> None:
    """The decode loop's caches and running residual give the tokens the training graph gives."""
    encoder, hypothesizer = networks
    vectors = torch.nn.functional.normalize(torch.randn(16, TOY.dim), dim=-1)
    with torch.inference_mode():
        rows = hypothesize(encoder, hypothesizer, vectors, END)
        for vector, row in zip(vectors, rows, strict=True):
            ids = torch.tensor([row])
            states = hypothesizer(vector[None], ids, torch.ones_like(ids, dtype=torch.bool), encoder)
            logits = states @ encoder.tokens.weight.T + hypothesizer.bias
            assert logits.argmax(-1)[0].tolist() == row


def test_a_batch_decodes_as_its_singles(networks: tuple[MiniEncoder, MiniHypothesizer]) -> None:
    encoder, hypothesizer = networks
    with torch.no_grad():
        hypothesizer.bias[END] += 6.0  # so that rows end at different steps and leave the batch
    vectors = torch.nn.functional.normalize(torch.randn(24, TOY.dim), dim=-1)
    together = hypothesize(encoder, hypothesizer, vectors, END)
    assert len({len(r) for r in together}) > 1
    assert together == [hypothesize(encoder, hypothesizer, v[None], END)[0] for v in vectors]


def test_no_vectors_give_no_texts(networks: tuple[MiniEncoder, MiniHypothesizer]) -> None:
    encoder, hypothesizer = networks
    assert hypothesize(encoder, hypothesizer, torch.empty(0, TOY.dim), END) == []


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="multiple of 2\\*num_heads"):
        MiniConfig(lexical_dim=100, num_heads=8)
    with pytest.raises(InputError, match="topic_share must lie between"):
        MiniConfig(topic_share=1.0)
