"""Codec training at toy size: it learns, goes on where it stopped, and its weights load as a codec."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lvm.codec.mini import MiniConfig
from lvm.codec.tokenizer import ChunkTokenizer, train_tokenizer
from lvm.codec.training import (
    ChunkTokens,
    TrainingSettings,
    blended,
    fit,
    learning_rate_at,
    main,
    noised,
    runs_of,
)
from lvm.codec.zoo import CODECS, load_codec
from lvm.errors import InputError, OutputError
from tests.doubles import fake_articles

TOY = MiniConfig(topic_dim=32, lexical_dim=64, d_ff=64, num_heads=4, decoder_layers=1)
QUICK = TrainingSettings(
    minutes=30, steps=5, batch_pairs=16, batch_decoded=16, learning_rate=3e-3, warmup_steps=5, topic_steps=20
)
TOKENIZER = CODECS["mini"] / "tokenizer.json"


@pytest.fixture(scope="module")
def chunks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chunks")
    words = ["river", "stone", "bread", "king", "winter", "engine", "forest", "letter", "bridge", "music"]
    random = np.random.default_rng(0)
    rows = [
        {"doc_id": doc, "text": " ".join(random.choice(words, 6)) + "."}
        for doc in range(60)
        for _ in range(6)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "part-00000.parquet")
    return folder


@pytest.fixture
def tokenizer() -> ChunkTokenizer:
    return ChunkTokenizer.load(TOKENIZER, TOY.max_tokens)


def curve(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]


def test_losses_fall_and_a_second_call_goes_on(
    chunks: Path, tokenizer: ChunkTokenizer, tmp_path: Path
) -> None:
    fit(chunks, tokenizer, tmp_path, TOY, QUICK, score_every_s=1e9)
    summary = fit(chunks, tokenizer, tmp_path, TOY, replace(QUICK, steps=90), score_every_s=1e9)
    first, second = curve(tmp_path)  # each a mean over its steps
    assert (first["step"], second["step"], summary["steps"]) == (5, 90, 90)
    assert second["chunks_seen"] == 90 * QUICK.batch_decoded
    assert second["nats_a_token"] < 0.7 * first["nats_a_token"]


def test_weights_load_as_a_codec_that_knows_its_tokenizer(
    chunks: Path, tokenizer: ChunkTokenizer, tmp_path: Path
) -> None:
    fit(chunks, tokenizer, tmp_path, TOY, QUICK)
    shutil.copyfile(TOKENIZER, tmp_path / "tokenizer.json")
    codec = load_codec("own", tmp_path, device="cpu")
    assert codec.identity.dim == TOY.dim
    decoded = codec.decode(codec.encode_chunks(["river stone bread."]).vectors)
    assert len(decoded.texts) == 1
    other = tmp_path / "tokenizer.json"
    train_tokenizer((" ".join(c) for c in fake_articles(30)), 400, other)
    with pytest.raises(InputError, match="the weights were trained with"):
        load_codec("own", tmp_path, device="cpu")


def test_a_checkpoint_of_other_sizes_is_refused(
    chunks: Path, tokenizer: ChunkTokenizer, tmp_path: Path
) -> None:
    fit(chunks, tokenizer, tmp_path, TOY, QUICK)
    with pytest.raises(OutputError, match="choose another --output"):
        fit(
            chunks, tokenizer, tmp_path, MiniConfig(topic_dim=16, lexical_dim=64, d_ff=64, num_heads=4), QUICK
        )


def test_a_run_goes_on_with_its_own_chunks_tokenizer_and_split_alone(
    chunks: Path, tokenizer: ChunkTokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    fit(chunks, tokenizer, run, TOY, QUICK)
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    other = tmp_path / "other"
    other.mkdir()
    rows = pq.read_table(chunks / "part-00000.parquet")
    pq.write_table(rows.slice(0, len(rows) - 6), other / "part-00000.parquet")
    train_tokenizer((" ".join(c) for c in fake_articles(30)), 400, tmp_path / "tokenizer.json")
    foreign = ChunkTokenizer.load(tmp_path / "tokenizer.json", TOY.max_tokens)
    with pytest.raises(
        OutputError, match=r"holds a run with chunks \w{16}, got \w{16}; use its original inputs"
    ):
        fit(other, tokenizer, run, TOY, QUICK)
    with pytest.raises(OutputError, match=f"holds a run with tokenizer .*got {foreign.sha256[:16]}"):
        fit(chunks, foreign, run, TOY, QUICK)
    with pytest.raises(OutputError, match="holds a run with seed 7, got 8"):
        fit(chunks, tokenizer, run, TOY, replace(QUICK, seed=8))
    with pytest.raises(OutputError, match="holds a run with limit None, got 100"):
        fit(chunks, tokenizer, run, TOY, QUICK, limit=100)
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before
    # The same corpus from another place is the same corpus; one of an older version cannot be checked, and says so.
    shutil.copytree(chunks, tmp_path / "moved")
    fit(tmp_path / "moved", tokenizer, run, TOY, replace(QUICK, steps=6))
    (run / "run.json").unlink()
    fit(chunks, tokenizer, run, TOY, replace(QUICK, steps=7))
    assert "does not record its chunks and tokenizer" in capsys.readouterr().out


@pytest.fixture
def trained(chunks: Path, tokenizer: ChunkTokenizer, tmp_path: Path) -> Path:
    folder = tmp_path / "first"
    fit(chunks, tokenizer, folder, TOY, QUICK)
    return folder


def test_a_frozen_encoder_keeps_its_bytes_while_the_hypothesizer_learns(
    chunks: Path, tokenizer: ChunkTokenizer, trained: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    frozen = replace(QUICK, freeze_encoder=True, steps=2, run_length=2)
    fit(chunks, tokenizer, again, TOY, frozen, score_every_s=1e9, init=trained)
    fit(chunks, tokenizer, again, TOY, replace(frozen, steps=60), score_every_s=1e9, init=trained)
    first, second = curve(again)
    assert (first["step"], second["step"], second["chunks_seen"]) == (2, 60, 60 * frozen.batch_decoded)
    assert second["nats_a_token"] < 0.8 * first["nats_a_token"]
    encoders = [(f / "encoder.safetensors").read_bytes() for f in (trained, again)]
    assert encoders[0] == encoders[1]
    hypothesizers = [(f / "hypothesizer.safetensors").read_bytes() for f in (trained, again)]
    assert hypothesizers[0] != hypothesizers[1]


def test_a_run_starts_from_the_weights_it_was_given(
    chunks: Path, tokenizer: ChunkTokenizer, trained: Path, tmp_path: Path
) -> None:
    still = replace(QUICK, learning_rate=1e-12, steps=1)
    fit(chunks, tokenizer, tmp_path / "still", TOY, still, init=trained)
    shutil.copyfile(TOKENIZER, trained / "tokenizer.json")
    shutil.copyfile(TOKENIZER, tmp_path / "still" / "tokenizer.json")
    vectors = [
        load_codec("own", folder, device="cpu").encode_chunks(["river stone bread."]).vectors
        for folder in (trained, tmp_path / "still")
    ]
    np.testing.assert_allclose(vectors[0], vectors[1], atol=0.02)  # bfloat16 weights; the centre is set anew


def test_weights_to_start_from_must_fit(
    chunks: Path, tokenizer: ChunkTokenizer, trained: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="choose another --init"):
        fit(chunks, tokenizer, tmp_path / "a", replace(TOY, d_ff=32), QUICK, init=trained)
    with pytest.raises(InputError, match="cannot load a codec from"):
        fit(chunks, tokenizer, tmp_path / "b", TOY, QUICK, init=tmp_path / "nowhere")
    with pytest.raises(InputError, match="give --init"):
        fit(chunks, tokenizer, tmp_path / "c", TOY, replace(QUICK, freeze_encoder=True))
    record = json.loads((trained / "config.json").read_text())
    (trained / "config.json").write_text(json.dumps({**record, "tokenizer_sha256": "0" * 64}))
    with pytest.raises(InputError, match=r"give the tokenizer\.json of --init"):
        fit(chunks, tokenizer, tmp_path / "d", TOY, QUICK, init=trained)


def test_the_command_of_the_card_runs(chunks: Path, tmp_path: Path) -> None:
    """The same command and weights as the shipped codec's, for two small steps."""
    mini = CODECS["mini"]
    before = (mini / "config.json").read_bytes()
    main(
        [
            *("--chunks", str(chunks), "--tokenizer", str(TOKENIZER), "--output", str(tmp_path)),
            *("--init", str(mini), "--freeze-encoder", "--steps", "2", "--batch-decoded", "8"),
            *("--batch-pairs", "8", "--learning-rate", "1e-4", "--device", "cpu"),
        ]
    )
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["training"]["freeze_encoder"] is True
    assert (record["training"]["steps"], record["held_out"]["chunks_seen"]) == (2, 16)
    assert record["config"] == json.loads(before)["config"]
    shutil.copyfile(TOKENIZER, tmp_path / "tokenizer.json")
    ours, theirs = (load_codec("mini", p, device="cpu").identity for p in (tmp_path, None))
    assert ours.digest == theirs.digest  # vectors made before stay valid


def test_runs_stay_in_their_article() -> None:
    doc_ids = np.repeat(np.arange(50, dtype=np.int32), np.tile([1, 2, 3, 9], 13)[:50])
    rng = np.random.default_rng(0)
    picked = rng.integers(0, len(doc_ids), 500)
    rows = runs_of(picked, doc_ids, 4, 2, rng).reshape(500, 4)
    assert (rows[:, 0] == picked).all()
    assert (doc_ids[rows] == doc_ids[picked][:, None]).all()
    inside = [i for i, row in enumerate(picked) if doc_ids[row] in doc_ids[row + 6 : row + 7]]
    assert len(inside) > 50
    assert (np.diff(rows[inside]) >= 1).all()
    assert (np.diff(rows[inside]) <= 2).all()


def test_blends_lean_to_the_same_topic_and_keep_their_share() -> None:
    P = TOY.topic_dim
    topics = torch.eye(P)[torch.arange(64) // 2]  # rows 2i and 2i + 1 share a topic and nothing else
    torch.manual_seed(0)
    words = torch.nn.functional.normalize(torch.randn(64, TOY.lexical_dim), dim=-1)
    pool = torch.nn.functional.normalize(torch.cat((topics, words), dim=-1), dim=-1)
    settings = TrainingSettings(blended_share=1.0, least_own=0.5)
    mixed = blended(pool, pool, settings, P)
    torch.testing.assert_close(mixed.norm(dim=-1), torch.ones(64))
    own = (mixed * pool).sum(-1)
    partner = (mixed * pool[torch.arange(64) ^ 1]).sum(-1)
    stranger = (mixed * pool[(torch.arange(64) + 2) % 64]).sum(-1)
    assert (own > 0.75).all()
    assert float(own.mean()) < 0.98
    # The partner stands out by its words, beyond the topic that all of the row's own share gives it.
    assert float(partner.mean()) > float(stranger.mean()) + 0.4
    some = blended(pool, pool, TrainingSettings(blended_share=0.25), P)
    changed = ((some * pool).sum(-1) < 0.999).float().mean()
    assert 0.05 < float(changed) < 0.45
    torch.testing.assert_close(blended(pool, pool, TrainingSettings(blended_share=0.0), P), pool)


@pytest.mark.parametrize("name", ["noised_share", "blended_share", "least_own", "faded_share"])
def test_shares_beyond_one_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} must lie between 0 and 1, got 1.5"):
        TrainingSettings(**{name: 1.5})
    with pytest.raises(InputError, match="run_length must be at least 1"):
        TrainingSettings(run_length=0)


def test_too_few_articles_are_refused(tokenizer: ChunkTokenizer, tmp_path: Path) -> None:
    pq.write_table(pa.table({"doc_id": [0, 0, 1], "text": ["a", "b", "c"]}), tmp_path / "part.parquet")
    with pytest.raises(InputError, match="at least 40 articles"):
        ChunkTokens.read(tmp_path, tokenizer).split(0.01, 0)


def test_an_empty_folder_is_refused(tokenizer: ChunkTokenizer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="make them with `latent chunk`"):
        ChunkTokens.read(tmp_path, tokenizer)


def test_noise_keeps_unit_norm_and_the_stated_cosines() -> None:
    vectors = torch.nn.functional.normalize(torch.randn(4000, TOY.dim), dim=-1)
    settings = TrainingSettings(noised_share=1.0, faded_share=0.0, lowest_cosine=0.75)
    torch.manual_seed(0)
    off = noised(vectors, settings, TOY.topic_dim)
    torch.testing.assert_close(off.norm(dim=-1), torch.ones(4000))
    cosines = (off * vectors).sum(-1)
    assert 0.85 < float(cosines.mean()) < 0.9
    assert float(torch.quantile(cosines, 0.01)) > 0.6
    clean = noised(vectors, TrainingSettings(noised_share=0.0, faded_share=0.0), TOY.topic_dim)
    torch.testing.assert_close(clean, vectors)


def test_the_learning_rate_rises_stays_and_falls_to_zero() -> None:
    settings = TrainingSettings(minutes=10, learning_rate=1.0, warmup_steps=10, decay_share=0.5)
    assert learning_rate_at(0, 0.0, settings) == pytest.approx(0.1)
    assert learning_rate_at(100, 200.0, settings) == 1.0
    assert learning_rate_at(100, 450.0, settings) == pytest.approx(0.5)
    assert learning_rate_at(100, 600.0, settings) == 0.0
