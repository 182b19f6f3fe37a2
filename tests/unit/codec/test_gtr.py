"""The two GTR codecs on checkpoints made here in the published files' layout, at toy depth and full width (768).

References are transformers' own T5 with vec2text's `mean_pool`, and sentence-transformers' `encode`, in float32.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lvm.codec.gtr import EMBEDDER, GTR_CODECS, MAX_TOKENS, SCALE_TEXTS, load_gtr_encoder
from lvm.codec.identity import require_same_codec
from lvm.codec.zoo import Codec, load_codec, load_tokenizer
from lvm.errors import IdentityError, InputError
from tests.checkpoints import Sizes, make_checkpoints
from tests.doubles import fake_articles

CHECKOUT = Path(__file__).resolve().parents[3]
TEXTS = [
    "The river rises in the hills.",
    "short",
    "The mill stood by the old bridge.",
    "word " * 80,
    "",
]
SAME = {"atol": 2e-5, "rtol": 0}
"""Vectors here have norm 1; float32 sums in another order."""


def add_sentence_transformers_files(embedder: Path, seed: int = 1) -> None:
    """modules.json and its folders as sentence-transformers/gtr-t5-base has them, with a random Dense."""
    kinds = [
        ("", "Transformer"),
        ("1_Pooling", "Pooling"),
        ("2_Dense", "Dense"),
        ("3_Normalize", "Normalize"),
    ]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    (embedder / "modules.json").write_text(json.dumps(modules))
    (embedder / "sentence_bert_config.json").write_text(
        json.dumps({"max_seq_length": 512, "do_lower_case": False})
    )
    modes = {
        m: m == "mean_tokens" for m in ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
    }
    (embedder / "1_Pooling").mkdir()
    (embedder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 768, **{f"pooling_mode_{k}": v for k, v in modes.items()}})
    )
    (embedder / "2_Dense").mkdir()
    (embedder / "2_Dense" / "config.json").write_text(
        json.dumps(
            {
                "in_features": 768,
                "out_features": 768,
                "bias": False,
                "activation_function": "torch.nn.modules.linear.Identity",
            }
        )
    )
    weight = torch.randn(768, 768, generator=torch.Generator().manual_seed(seed)) / 768**0.5
    save_file({"linear.weight": weight}, embedder / "2_Dense" / "model.safetensors")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every repository of both codecs."""
    folder = tmp_path_factory.mktemp("gtr")
    make_checkpoints(folder, [" ".join(c) for c in fake_articles(40)], Sizes(vocabulary_size=512))
    add_sentence_transformers_files(folder / EMBEDDER)
    ours, theirs = GTR_CODECS["gtr-ielab"], GTR_CODECS["gtr-jxe"]
    for new, old in ((ours.hypothesizer, theirs.hypothesizer), (ours.corrector, theirs.corrector)):
        shutil.copytree(folder / old, folder / new)
        config = json.loads((folder / new / "config.json").read_text())
        config["embedder_model_name"] = "gtr_base_st"
        (folder / new / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def jxe(root: Path) -> Codec:
    return load_codec("gtr-jxe", root, device="cpu", precision="float32")


@pytest.fixture(scope="module")
def ielab(root: Path) -> Codec:
    return load_codec("gtr-ielab", root, device="cpu", precision="float32")


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    shutil.copytree(root, tmp_path / "copy")
    return tmp_path / "copy"


def test_jxe_gives_the_vectors_of_vec2texts_own_pooling(root: Path, jxe: Codec) -> None:
    from transformers import AutoModel, AutoTokenizer
    from vec2text.models.model_utils import mean_pool

    tokenizer = AutoTokenizer.from_pretrained(root / EMBEDDER)
    network = AutoModel.from_pretrained(root / EMBEDDER).encoder.eval()
    batch = tokenizer(
        TEXTS, max_length=MAX_TOKENS, truncation=True, padding="max_length", return_tensors="pt"
    )
    with torch.no_grad():
        states = network(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        expected = mean_pool(states, batch.attention_mask).numpy()
    encoded = jxe.encode_chunks(TEXTS)
    norms = np.linalg.norm(expected, axis=1)
    np.testing.assert_allclose(encoded.norms, norms, rtol=2e-5)
    np.testing.assert_allclose(encoded.vectors, expected / norms[:, None], **SAME)
    assert np.abs(norms - 1).min() > 0.05  # else this could not tell normalised from not
    assert encoded.truncated.tolist() == [False, False, False, True, False]


def test_ielab_gives_the_vectors_of_sentence_transformers(root: Path, ielab: Codec) -> None:
    from sentence_transformers import SentenceTransformer

    reference = SentenceTransformer(str(root / EMBEDDER), device="cpu")
    reference.max_seq_length = MAX_TOKENS
    encoded = ielab.encode_chunks(TEXTS)
    np.testing.assert_allclose(encoded.vectors, reference.encode(TEXTS), **SAME)
    np.testing.assert_allclose(encoded.norms, 1.0, atol=1e-5)


def test_a_batch_is_its_singles(jxe: Codec) -> None:
    together = jxe.encode_chunks(TEXTS).vectors
    alone = np.concatenate([jxe.encode_chunks([t]).vectors for t in TEXTS])
    np.testing.assert_allclose(together, alone, **SAME)


def test_one_model_name_gives_two_codecs_that_cannot_be_joined(jxe: Codec, ielab: Codec) -> None:
    a, b = jxe.identity, ielab.identity
    assert (a.dense, a.normalized, a.pooling) == (False, False, "mean")
    assert (b.dense, b.normalized, b.pooling) == (True, True, "mean")
    assert a.encoder_sha256 != b.encoder_sha256
    assert a.tokenizer_sha256 == b.tokenizer_sha256
    assert (a.max_tokens, a.dim) == (32, 768)
    with pytest.raises(IdentityError) as caught:
        require_same_codec(a, b, "the index", "the query")
    assert str(a) in str(caught.value)
    assert str(b) in str(caught.value)
    # What the refusal saves people from: the same texts, and vectors that have nothing in common.
    cosines = (jxe.encode_chunks(TEXTS[:3]).vectors * ielab.encode_chunks(TEXTS[:3]).vectors).sum(1)
    assert np.abs(cosines).max() < 0.2


def test_the_identity_follows_weights_dense_and_tokenizer(root: Path, copy: Path, ielab: Codec) -> None:
    from safetensors.torch import load_file

    def identity(name: str) -> str:
        return load_gtr_encoder(name, copy, torch.device("cpu"))[1].digest

    jxe_before = identity("gtr-jxe")
    assert identity("gtr-ielab") == ielab.identity.digest
    dense = copy / EMBEDDER / "2_Dense" / "model.safetensors"
    tensors = load_file(dense)
    tensors["linear.weight"][3, 3] += 1.0
    save_file(tensors, dense)
    assert identity("gtr-ielab") != ielab.identity.digest
    assert identity("gtr-jxe") == jxe_before  # it has no Dense
    tokenizer = copy / EMBEDDER / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    assert identity("gtr-jxe") != jxe_before


def test_decoding_restores_the_scale_the_decoder_was_trained_on(
    jxe: Codec, ielab: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    invert, given = jxe.inverter.invert, []
    monkeypatch.setattr(jxe.inverter, "invert", lambda v, *rest: given.append(v) or invert(v, *rest))
    encoded = jxe.encode_chunks(TEXTS[:3])
    known = jxe.decode(encoded.vectors, steps=1, norms=encoded.norms)
    assert len(known.texts) == 3
    np.testing.assert_allclose(given[-1], encoded.vectors * encoded.norms[:, None], atol=1e-5)
    jxe.decode(encoded.vectors * 3.0)  # a predicted vector's length says nothing
    np.testing.assert_allclose(given[-1], encoded.vectors * np.float32(jxe.scale), atol=1e-5)
    assert jxe.scale == pytest.approx(float(jxe.encode_chunks(list(SCALE_TEXTS)).norms.mean()))
    assert abs(jxe.scale - 1) > 0.05
    assert ielab.scale == 1.0
    with pytest.raises(InputError, match=r"norms have shape \(2,\) for 3 vectors"):
        jxe.decode(encoded.vectors, norms=encoded.norms[:2])


def test_the_chunker_gets_the_decoders_limit(root: Path) -> None:
    tokenizer = load_tokenizer("gtr-ielab", root)
    assert tokenizer.max_tokens == MAX_TOKENS
    ids, lengths = tokenizer.encode(["word " * 80])
    assert len(ids[0]) == MAX_TOKENS < lengths[0]


def test_missing_files_are_named_with_their_place(copy: Path) -> None:
    (copy / EMBEDDER / "model.safetensors").unlink()
    shutil.rmtree(copy / "jxm" / "gtr__nq__32__correct")
    with pytest.raises(InputError) as caught:
        load_codec("gtr-jxe", copy)
    message = str(caught.value)
    assert f"model.safetensors of https://huggingface.co/{EMBEDDER} to {copy}/{EMBEDDER}/" in message
    assert "config.json, model.safetensors of https://huggingface.co/jxm/gtr__nq__32__correct" in message
    assert "https://huggingface.co/jxm/gtr__nq__32 " not in message  # that one is there


def test_a_pickle_is_refused_with_how_to_convert_it(copy: Path) -> None:
    dense = copy / EMBEDDER / "2_Dense"
    torch.save({"linear.weight": torch.eye(768)}, dense / "pytorch_model.bin")
    (dense / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"pytorch_model\.bin is a pickle and is never loaded; convert it"):
        load_codec("gtr-ielab", copy)
    load_gtr_encoder("gtr-jxe", copy, torch.device("cpu"))  # needs no Dense


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("modules.json", lambda m: m[:2], "lists Transformer, Pooling; expected Transformer, Pooling, Dense"),
        (
            "1_Pooling/config.json",
            lambda c: {**c, "pooling_mode_max_tokens": True},
            "pools by max_tokens, mean_tokens; expected mean_tokens only",
        ),
        (
            "2_Dense/config.json",
            lambda c: {**c, "activation_function": "torch.nn.modules.activation.Tanh"},
            r"has activation torch\.nn\.modules\.activation\.Tanh; expected Identity",
        ),
    ],
    ids=["modules", "pooling", "activation"],
)
def test_another_contract_under_the_same_name_is_refused(copy: Path, file: str, change, message: str) -> None:
    path = copy / EMBEDDER / file
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(InputError, match=message):
        load_codec("gtr-ielab", copy)


def test_decoders_of_another_length_are_refused(copy: Path) -> None:
    path = copy / "jxm" / "gtr__nq__32" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_seq_length": 128}))
    with pytest.raises(InputError, match="was trained on 128 tokens; expected 32 for codec gtr-jxe"):
        load_codec("gtr-jxe", copy)


def test_a_tokenizer_that_ends_no_text_is_refused(copy: Path) -> None:
    path = copy / EMBEDDER / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "post_processor": None}))
    with pytest.raises(InputError, match="does not end a text with </s>"):
        load_tokenizer("gtr-jxe", copy)


LOAD = """
import sys
from lvm.codec.zoo import load_codec
from lvm.errors import LvmError
try:
    codec = load_codec("gtr-jxe", device="cpu")
except LvmError as err:
    sys.exit(f"error: {err}")
print(codec.identity.digest)
"""


def run_with_hub(home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Load `gtr-jxe` by name in a process of its own: the hub's client reads its settings on import."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    return subprocess.run(
        [sys.executable, "-c", LOAD],
        env={**clean, "HF_HOME": str(home), "PYTHONPATH": str(CHECKOUT), **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_without_network_the_error_says_what_to_fetch_and_where_to_put_it(tmp_path: Path) -> None:
    # A port on which nobody listens, so that no name is looked up and nothing is waited for.
    done = run_with_hub(tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 1
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("error:")]
    for repository, files in GTR_CODECS["gtr-jxe"].files.items():
        assert f"{', '.join(files)} of https://huggingface.co/{repository} to DIR/{repository}/" in line
    assert line.endswith("then give --codec-path DIR")


def test_files_in_the_hubs_cache_are_used_without_network(root: Path, tmp_path: Path, jxe: Codec) -> None:
    revision = "0" * 40
    for repository, files in GTR_CODECS["gtr-jxe"].files.items():
        entry = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
        (entry / "refs").mkdir(parents=True)
        (entry / "refs" / "main").write_text(revision)
        for file in files:
            target = entry / "snapshots" / revision / file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(root / repository / file)
    done = run_with_hub(tmp_path, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == jxe.identity.digest
