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
from lvm.codec.training import ChunkTokens, TrainingSettings, fit, learning_rate_at, noised
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
    decoded = codec.decode(codec.encode(["river stone bread."]).vectors)
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
