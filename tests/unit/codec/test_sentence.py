"""Models in sentence-transformers' layout as a codec, and a writer fitted to short vectors; on toy weights."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from lvm.codec import writer_training
from lvm.codec.ladder import Ladder
from lvm.codec.sentence import load_sentence_encoder, load_sentence_network
from lvm.codec.writer import FILES, Writer
from lvm.codec.zoo import load_codec, load_tokenizer
from lvm.errors import InputError
from tests.language import WORDS, toy_base, toy_identity


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A BERT of 24 numbers with a Dense layer and normalisation."""
    from safetensors.torch import save_file
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, *"abcdefghijklmnopqrstuvwxyz"]
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=20,
    )
    BertModel(config).save_pretrained(tmp_path)
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    kinds = ("Transformer", "1_Pooling", "2_Dense", "3_Normalize")
    for name in kinds[1:]:
        (tmp_path / name).mkdir()
    (tmp_path / "modules.json").write_text(
        json.dumps(
            [
                {
                    "path": "" if k == "Transformer" else k,
                    "type": f"sentence_transformers.models.{k.split('_')[-1]}",
                }
                for k in kinds
            ]
        )
    )
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    dense = {"in_features": 24, "out_features": 16, "bias": True}
    activation = "torch.nn.modules.linear.Identity"
    (tmp_path / "2_Dense" / "config.json").write_text(
        json.dumps({**dense, "activation_function": activation})
    )
    save_file(
        {"linear.weight": torch.randn(16, 24), "linear.bias": torch.randn(16)},
        tmp_path / "2_Dense" / "model.safetensors",
    )
    return tmp_path


TEXTS = ["river bridge", "steam engine mill coal town", "king"]


def test_vectors_are_those_of_the_modules_one_after_the_other(folder: Path) -> None:
    encoder, identity = load_sentence_encoder(folder, torch.device("cpu"), "float32")
    assert (identity.dim, identity.pooling, identity.dense, identity.normalized) == (16, "mean", True, True)
    assert identity.max_tokens == 20  # the model's own limit, below a chunk's
    network = load_sentence_network(folder)
    for text, vector in zip(TEXTS, encoder.encode(TEXTS).vectors, strict=True):
        ids = torch.tensor([encoder.tokenizer.encode([text])[0][0]])
        with torch.inference_mode():
            states = network.transformer(input_ids=ids).last_hidden_state.mean(1)
            expected = torch.nn.functional.normalize(network.dense[0](states), dim=-1)[0]
        np.testing.assert_allclose(vector, expected.numpy(), atol=1e-5)


def test_as_a_codec_it_encodes_and_says_that_it_reads_nothing_back(folder: Path) -> None:
    codec = load_codec("sentence-transformers", folder, device="cpu")
    vectors = codec.encode_chunks(TEXTS).vectors
    assert vectors.shape == (3, 16)
    assert load_tokenizer("sentence-transformers", folder).num_special == 2
    assert "fit one with `latent train-writer`" in (codec.no_writer or "")
    with pytest.raises(InputError, match="has only an encoder, no decoder"):
        codec.decode(vectors)
    with pytest.raises(InputError, match="neither a decoder nor a writer"):
        Ladder(codec).decode(vectors)
    with pytest.raises(InputError, match="needs --codec-path"):
        load_codec("sentence-transformers")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("modules.json", "has no modules.json"),
        ("model.safetensors", "has no model.safetensors"),
        ("LSTM", "has a module LSTM; expected only Transformer, Pooling, Dense and Normalize"),
        ("max", "asks for"),
    ],
)
def test_what_cannot_be_read_is_told(folder: Path, change: str, message: str) -> None:
    if change == "max":
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))
    elif change == "LSTM":
        text = (folder / "modules.json").read_text()
        (folder / "modules.json").write_text(text.replace("models.Dense", "models.LSTM"))
    else:
        (folder / change).unlink()
    with pytest.raises(InputError, match=message):
        load_sentence_network(folder)


def test_a_writer_fitted_to_short_vectors_learns_goes_on_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    base, identity = toy_base(), toy_identity(24)
    monkeypatch.setattr(writer_training, "load_base", lambda path: base)
    axes = rng.standard_normal((len(WORDS), 24)).astype(np.float32)
    rows = []
    for doc in range(60):
        for position in range(9):
            said = rng.choice(len(WORDS), 3, replace=False)
            vector = axes[said].sum(0) + 0.1 * rng.standard_normal(24)
            vector = (vector / np.linalg.norm(vector)).astype(np.float16)
            text = " ".join(WORDS[i] for i in said)
            rows.append({"doc_id": doc, "position": position, "text": text, "vector": vector.tolist()})
    schema = pa.schema(
        [
            ("doc_id", pa.int32()),
            ("position", pa.int32()),
            ("text", pa.string()),
            ("vector", pa.list_(pa.float16(), 24)),
        ]
    )
    vectors = tmp_path / "vectors"
    vectors.mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema), vectors / "part-00000.parquet")
    (vectors / "manifest.json").write_text(json.dumps({"codec": identity.to_dict()}))
    output = tmp_path / "writer"

    def fit(minutes: float) -> dict[str, float]:
        settings = writer_training.WriterSettings(
            minutes=minutes, evidence_steps=60, evidence_batch=64, num_words=len(WORDS), rank=4
        )
        return writer_training.fit_writer(vectors, None, output, settings, score_every_s=1.0)

    first = fit(0.03)
    steps = first["steps"]
    second = fit(0.12)
    assert second["steps"] > steps  # gone on from the checkpoint, not begun again
    curve = [json.loads(line) for line in (output / "curve.jsonl").read_text().splitlines()]
    assert curve[-1]["own"] < curve[0]["own"]
    assert all((output / name).is_file() for name in FILES)
    writer = Writer(Writer.parts(output, base, identity), base, "float32")
    assert writer.least_log_prob < writer.usual_log_prob < 0
    assert all(
        drafts[0].text is not None for drafts in writer.write(axes / np.linalg.norm(axes, axis=1)[:, None])
    )
