"""Ours against the vec2text package, on the same weights: small checkpoints trained here on the sample."""

import contextlib
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs import check_codec
from lvm.codec.gtr import MAX_TOKENS
from lvm.codec.inverter import Inverter, InverterSettings, Request, Rounds, Vec2TextHypothesizing
from lvm.codec.runner import Precision
from lvm.codec.vec2text import Corrector, Hypothesizer
from lvm.codec.vec2text_package import embed, load_vec2text, vec2text_ids
from lvm.codec.zoo import Codec, load_codec
from lvm.errors import InputError
from tests.checkpoints import CORRECTOR, HYPOTHESIZER, Sizes, fit, make_checkpoints

# transformers, accelerate and vec2text warn about each other's versions; none of it is ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore")

AS_VEC2TEXT = InverterSettings(keep_best=False, stop_early=False, beam_fills_with_end=True)
NUM_VECTORS = 64


def sample_sentences() -> list[str]:
    folder = Path(__file__).parents[3] / "data" / "sample"
    articles = [
        json.loads(line)["text"]
        for file in sorted(folder.glob("*.jsonl"))
        for line in file.open(encoding="utf-8")
    ]
    return [s for text in articles for s in re.split(r"(?<=[.!?;])\s+", text) if len(s) > 20]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    sentences = sample_sentences()
    make_checkpoints(folder, sentences, Sizes())
    fit(folder, sentences[NUM_VECTORS:1400], steps=220, batch=32)
    return folder


@pytest.fixture(scope="module")
def theirs(root: Path) -> Any:
    return load_vec2text(root)


@pytest.fixture(scope="module")
def vectors(theirs: Any) -> np.ndarray:
    return embed(theirs, sample_sentences()[:NUM_VECTORS]).numpy()


def make_inverter(root: Path, theirs: Any, precision: Precision, settings: InverterSettings) -> Inverter:
    tokenizer = theirs.tokenizer

    def to_texts(ids: Sequence[Sequence[int]]) -> list[str]:
        return list(tokenizer.batch_decode([list(i) for i in ids], skip_special_tokens=True))

    return Inverter(
        Vec2TextHypothesizing(Hypothesizer(root / HYPOTHESIZER, precision)),
        Corrector(root / CORRECTOR, precision),
        lambda texts: embed(theirs, texts).numpy(),
        to_texts,
        lambda texts: tokenizer(list(texts), max_length=MAX_TOKENS, truncation=True).input_ids,
        max_new_tokens=MAX_TOKENS - 1,  # vec2text counts the start token in its max_length
        settings=settings,
    )


@pytest.fixture(scope="module")
def ours(root: Path, theirs: Any) -> Inverter:
    return make_inverter(root, theirs, "float32", AS_VEC2TEXT)


def with_settings(inverter: Inverter, **changes: Any) -> Inverter:
    """The same networks under other settings."""
    return Inverter(
        inverter.hypothesizer,
        inverter.corrector,
        inverter._embed,
        inverter._to_texts,
        inverter._to_ids,
        inverter.max_new_tokens,
        settings=replace(inverter.settings, **changes),
    )


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_token_ids_are_those_of_vec2text(
    ours: Inverter, theirs: Any, vectors: np.ndarray, steps: int
) -> None:
    expected = vec2text_ids(theirs, torch.from_numpy(vectors), steps)
    got = [list(row.ids) for row in ours.invert(vectors, steps)]
    assert got == expected


def test_the_compared_texts_end_repeat_and_get_corrected(
    theirs: Any, vectors: np.ndarray, ours: Inverter
) -> None:
    first, third = ours.invert(vectors, 0), ours.invert(vectors, 3)
    ended = sum(row.ids[-1] == 1 for row in first)
    assert ended > NUM_VECTORS / 4, f"only {ended} texts end by themselves"
    assert len({len(row.ids) for row in first}) > 5, "rows leave the batch at few different places"
    changed = sum(a.ids != b.ids for a, b in zip(first, third, strict=True))
    assert changed > NUM_VECTORS / 4, f"correction changed only {changed} texts"
    assert any(len(set(row.ids)) < len(row.ids) - 2 for row in first), "nothing is repeated"


@pytest.mark.parametrize(("width", "steps"), [(2, 1), (2, 3), (4, 2)])
def test_sequence_beam_search_is_that_of_vec2text(
    ours: Inverter, theirs: Any, vectors: np.ndarray, width: int, steps: int
) -> None:
    few = vectors[:16]
    expected = vec2text_ids(theirs, torch.from_numpy(few), steps, beam_width=width)
    got = [list(row.ids) for row in ours.invert_with_beam(few, steps, width)]
    assert got == expected


def test_a_beam_without_filling_does_not_depend_on_its_batch(ours: Inverter, vectors: np.ndarray) -> None:
    plain = with_settings(ours, beam_fills_with_end=False)
    batch = plain.invert_with_beam(vectors[:8], 2, 2)
    singles = [plain.invert_with_beam(vectors[i : i + 1], 2, 2)[0] for i in range(8)]
    crowded = with_settings(plain, max_rows=6).invert_with_beam(vectors[:8], 2, 2)
    assert [row.ids for row in batch] == [row.ids for row in singles] == [row.ids for row in crowded]


def test_a_batch_equals_its_singles_in_any_order_and_mix_of_steps(
    ours: Inverter, vectors: np.ndarray
) -> None:
    steps = [row % 4 for row in range(24)]
    singles = [ours.invert(vectors[row : row + 1], steps[row])[0] for row in range(24)]
    batch = ours.invert(vectors[:24], steps)
    order = np.random.default_rng(1).permutation(24)
    shuffled = ours.invert(vectors[order], [steps[row] for row in order])
    crowded = with_settings(ours, max_rows=5).invert(vectors[:24], steps)
    assert [row.ids for row in batch] == [row.ids for row in singles]
    assert [row.ids for row in crowded] == [row.ids for row in singles]
    assert [shuffled[int(np.flatnonzero(order == row)[0])].ids for row in range(24)] == [
        row.ids for row in singles
    ]
    np.testing.assert_allclose([row.cosine for row in batch], [row.cosine for row in singles], atol=1e-5)


def test_cosines_are_of_the_texts_returned(ours: Inverter, theirs: Any, vectors: np.ndarray) -> None:
    rows = with_settings(ours, keep_best=True).invert(vectors[:16], 3)
    again = embed(theirs, [row.text for row in rows])
    expected = torch.cosine_similarity(again, torch.from_numpy(vectors[:16])).numpy()
    np.testing.assert_allclose([row.cosine for row in rows], expected, atol=1e-5)


def test_the_best_text_of_all_steps_is_kept(ours: Inverter, vectors: np.ndarray) -> None:
    by_step = np.array([[row.cosine for row in ours.invert(vectors, steps)] for steps in range(4)])
    best = with_settings(ours, keep_best=True).invert(vectors, 3)
    np.testing.assert_allclose([row.cosine for row in best], by_step.max(0), atol=1e-5)
    assert (by_step.max(0) > by_step[3] + 1e-4).any(), "the last step was always the best: nothing was tested"


def test_a_row_that_gains_nothing_leaves_early(ours: Inverter, vectors: np.ndarray) -> None:
    rows = with_settings(ours, stop_early=True, keep_best=True).invert(vectors, 6)
    used = np.array([row.steps_used for row in rows])
    full = ours.invert(vectors, 6)
    assert all(row.steps_used == 6 for row in full)
    assert used.min() == 1
    assert used.max() > used.min()
    for row, steps in zip(rows[:12], used[:12], strict=True):
        trail = [ours.invert(vectors[:12], s) for s in range(steps + 1)]
        cosines = [t[rows.index(row)].cosine for t in trail]
        gains = [c - max(cosines[:i]) for i, c in enumerate(cosines) if i]
        assert all(g >= ours.settings.min_gain for g in gains[:-1])
        assert steps == 6 or gains[-1] < ours.settings.min_gain


def test_a_row_at_its_target_takes_no_further_step(ours: Inverter, vectors: np.ndarray) -> None:
    first = np.array([row.cosine for row in ours.invert(vectors, 0)])
    target = float(np.median(first))
    rows = ours.invert(vectors, 2, target_cosine=target)
    assert all((row.steps_used == 0) == (cosine >= target) for row, cosine in zip(rows, first, strict=True))


def test_a_row_starts_from_the_nearer_of_a_neighbours_text_and_its_own(
    ours: Inverter, vectors: np.ndarray
) -> None:
    truth = sample_sentences()[:8]
    nonsense = ["the of and"] * 8
    plain = ours.invert(vectors[:8], 0)
    warm = ours.invert(vectors[:8], 0, starts=truth)
    cold = ours.invert(vectors[:8], 0, starts=nonsense)
    forced = ours.invert(vectors[:8], 0, starts=nonsense, start_always=True)
    assert all(w.cosine > p.cosine for w, p in zip(warm, plain, strict=True))
    assert all(f.text == "the of and" for f in forced)
    for row, own, other in zip(cold, plain, forced, strict=True):
        assert row.text == (own.text if own.cosine >= other.cosine else other.text)


def test_rows_join_and_leave_between_rounds(ours: Inverter, vectors: np.ndarray) -> None:
    expected = [ours.invert(vectors[row : row + 1], steps)[0].ids for row, steps in enumerate((3, 1, 2))]
    rounds = Rounds(with_settings(ours, max_rows=2))
    first = rounds.add(Request(vectors[0], 3))
    done = rounds.run()
    second, third = rounds.add(Request(vectors[1], 1)), rounds.add(Request(vectors[2], 2))
    nobody = rounds.add(Request(vectors[3], 3))
    assert not done
    assert len(rounds) == 4
    done = rounds.run()
    assert list(done) == [second], "the third has no room yet, the first has a step to go"
    assert rounds.drop(nobody)
    assert not rounds.drop(nobody)
    while len(rounds):
        done |= rounds.run()
    assert [done[ticket].ids for ticket in (first, second, third)] == expected
    assert nobody not in done


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_lower_precision_stays_near_float32(
    root: Path, theirs: Any, ours: Inverter, precision: Precision
) -> None:
    # Texts differ by chance, in either direction: of 64 the mean is off by 0.006, of 512 by 0.002.
    vectors = embed(theirs, sample_sentences()[1400:1912]).numpy()
    settings = InverterSettings(stop_early=False)
    exact = with_settings(ours, keep_best=True).invert(vectors, 1)
    rough = make_inverter(root, theirs, precision, settings).invert(vectors, 1)
    loss = np.mean([row.cosine for row in exact]) - np.mean([row.cosine for row in rough])
    assert loss < 0.01
    same = np.mean([a.ids[:3] == b.ids[:3] for a, b in zip(exact, rough, strict=True)])
    assert same > 0.6


def test_steps_without_a_corrector_are_refused(ours: Inverter, vectors: np.ndarray) -> None:
    bare = Inverter(ours.hypothesizer, None, ours._embed, ours._to_texts, ours._to_ids, 31)
    with pytest.raises(InputError, match="no corrector: expected steps 0, got 2"):
        bare.invert(vectors[:2], 2)
    with pytest.raises(InputError, match="1 step counts and 2 starts for 2 vectors"):
        ours.invert(vectors[:2], [1], starts=["a", "b"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").write_bytes(b"no"), "cannot be read"),
        (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            "pytorch_model.bin is a pickle, which is never loaded",
        ),
        (lambda f: (f / "config.json").unlink(), "expected a folder saved by vec2text"),
        (lambda f: (f / "config.json").write_text("[]"), "holds a list, expected an object"),
    ],
)
def test_a_damaged_checkpoint_is_an_error_that_says_so(
    root: Path, tmp_path: Path, damage: Any, message: str
) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((root / HYPOTHESIZER / name).read_bytes())
    damage(folder)
    with pytest.raises(InputError, match=re.escape(message)):
        Hypothesizer(folder, "float32")


def test_a_hypothesizer_is_no_corrector(root: Path) -> None:
    with pytest.raises(InputError, match=re.escape("lacks the tensor embedding_transform_1.0.weight")):
        Corrector(root / HYPOTHESIZER, "float32")


# ---- the package as an engine


@pytest.fixture(scope="module")
def package(root: Path) -> Codec:
    return load_codec("gtr-jxe", root, "cpu", "float32", engine="vec2text")


def test_the_engine_vec2text_writes_what_the_package_writes(package: Codec, root: Path, theirs: Any) -> None:
    units = package.encode(sample_sentences()[:6])
    for steps in (0, 2):
        ids = vec2text_ids(theirs, torch.from_numpy(units * np.float32(package.scale)), steps)
        decoded = package.decode(units, steps=steps)
        assert decoded.texts == theirs.tokenizer.batch_decode(ids, skip_special_tokens=True)
        again = embed(theirs, decoded.texts)
        expected = torch.cosine_similarity(again, torch.from_numpy(units)).numpy()
        np.testing.assert_allclose(decoded.cosines, expected, atol=1e-5)
    mixed = package.decode(units, steps=[0, 2, 0, 2, 0, 2])
    first = package.decode(units, steps=0)
    assert mixed.texts == [(first, decoded)[i % 2].texts[i] for i in range(6)]
    assert mixed.steps_used.tolist() == [0, 2, 0, 2, 0, 2]
    assert first.texts == load_codec("gtr-jxe", root, "cpu", "float32").decode(units, steps=0).texts


def test_the_package_leaves_the_process_as_it_was(root: Path) -> None:
    import evaluate

    before, load = Path.cwd(), evaluate.load
    load_vec2text(root)
    assert (Path.cwd(), evaluate.load) == (before, load)


def test_what_the_package_cannot_do_is_refused(package: Codec, root: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="engine vec2text decodes only gtr-jxe, got 'mini'"):
        load_codec("mini", engine="vec2text")
    with pytest.raises(InputError, match="unknown engine 'theirs'; expected one of lvm, vec2text"):
        load_codec("gtr-jxe", root, engine="theirs")
    with pytest.raises(InputError, match="supports no target cosine and no starts"):
        package.decode(package.encode(["a"]), target_cosine=0.9)
    with pytest.raises(InputError, match="decodes whole batches"):
        package.reading()
    for part in ("jxm", "sentence-transformers"):
        (tmp_path / part).symlink_to(root / part)
    with pytest.raises(InputError, match=r"needs t5-base in .* besides the codec; download config\.json"):
        load_codec("gtr-jxe", tmp_path, engine="vec2text")


def test_the_command_compares_engines(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # In int8 random weights write other texts than in float32.
    monkeypatch.setattr("lvm.codec.runner.best_precision", lambda device: "float32")
    texts = sample_sentences()[:4]
    shown = {}
    for engine in ("lvm", "vec2text"):
        with contextlib.suppress(SystemExit):  # so small a pair may look mismatched
            check_codec.main(texts, codec="gtr-jxe", codec_path=root, steps=0, engine=engine, as_json=True)
        shown[engine] = json.loads(capsys.readouterr().out)
        assert shown[engine]["engine"] == engine
    assert shown["lvm"]["cosine"] == pytest.approx(shown["vec2text"]["cosine"], abs=1e-3)
