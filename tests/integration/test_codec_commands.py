"""`latent codec eval` and `latent codec check`, as real processes on the bundled sample."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lvm.codec.zoo import CODECS

pytestmark = pytest.mark.integration

CHECKOUT = Path(__file__).resolve().parents[2]


def latent(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lvm.cli", "codec", *arguments],
        cwd=CHECKOUT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.slow
def test_eval_prints_the_yardstick() -> None:
    extra = ("--decoded", "60", "--cosines", "1,0.9", "--ridge-windows", "900", "--candidates", "1500")
    done = latent("eval", "--input", "sample", "--limit", "90", "--json", *extra)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(done.stdout)
    for name in ("bleu", "token_f1", "exact", "cosine"):
        assert set(figures[name]) == {"0", "1", "3", "5"}
    assert figures["bleu"]["1"] > max(85, figures["bleu"]["0"])
    assert figures["cosine"]["5"] >= figures["cosine"]["1"] > figures["cosine"]["0"]
    assert figures["truncated"] == 0
    assert figures["candidates"] == 1500
    assert (figures["articles"], figures["decoded"]) == (90, 60)
    for name in ("next_r1", "next_r10", "tfidf_next_r1", "tfidf_next_r10"):
        assert 0 <= figures[name] <= 1
    assert figures["next_r10"] >= figures["next_r1"]
    assert figures["seconds"] > 0
    near, far = figures["at_cosine"]["1"], figures["at_cosine"]["0.9"]
    assert near["token_f1"]["1"] > far["token_f1"]["1"] > 0.5
    assert near["bleu"]["1"] == pytest.approx(figures["bleu"]["1"], abs=1.0)
    assert figures["ridge"]["asked_windows"] == figures["tfidf_ridge"]["asked_windows"] > 100


def test_check_sends_texts_round_and_counts_what_it_cut() -> None:
    done = latent("check", "--json", "Copper conducts heat well.", "word " * 60)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(done.stdout)
    assert (figures["texts"], figures["truncated"], figures["mismatched"]) == (2, 1, False)
    assert figures["exact"] >= 0.5
    assert "1 of 2 texts are longer than 32 tokens and were truncated" in done.stderr


def test_check_warns_of_an_encoder_and_a_decoder_that_do_not_match(tmp_path: Path) -> None:
    """The decoder reads by the encoder's own table; after a shuffle of its columns it reads other words."""
    folder = tmp_path / "mixed"
    shutil.copytree(CODECS["mini"], folder)
    tensors = load_file(folder / "hypothesizer.safetensors")
    tensors["bias"] = tensors["bias"].flip(0) * 5
    tensors["decoder.final_layer_norm.weight"] *= -20
    save_file(tensors, folder / "hypothesizer.safetensors")
    done = latent("check", "--codec-path", str(folder), "--num-chunks", "8", "--steps", "0")
    assert done.returncode == 1
    assert "suggests that encoder and decoder do not match" in done.stderr
    assert "mixed (" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("eval", "--input", "sample", "--cosines", "0.9;0.8"), "--cosines takes comma-separated numbers"),
        (("eval", "--input", "sample", "--cosines", "2"), "must be above 0 and at most 1"),
        (("check", "--codec", "gtr"), "unknown codec 'gtr'; expected one of gtr-ielab, gtr-jxe, mini"),
        (("check", "--steps", "9", "a"), "supports 0, 1, 2, 3, 4, 5 steps, got 9"),
    ],
)
def test_bad_options_are_one_line(arguments: tuple[str, ...], message: str) -> None:
    done = latent(*arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_codec_trained_on_own_articles_is_what_codec_path_takes(tmp_path: Path) -> None:
    mini = CODECS["mini"]
    command = (
        *("--input", "sample", "--output", str(tmp_path / "own"), "--minutes", "0.1"),
        *("--init", str(mini), "--freeze-encoder"),
    )
    done = subprocess.run(
        [sys.executable, "-m", "lvm.cli", "train-codec", *command],
        cwd=CHECKOUT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["stage"] == "train-codec"
    assert summary["rows"] > 0
    own = tmp_path / "own"
    assert (own / "encoder.safetensors").read_bytes() == (mini / "encoder.safetensors").read_bytes()
    assert (own / "hypothesizer.safetensors").read_bytes() != (mini / "hypothesizer.safetensors").read_bytes()
    checked = latent("check", "--codec-path", str(own), "--num-chunks", "16", "--json")
    assert checked.returncode == 0, checked.stderr[-2000:]
    assert json.loads(checked.stdout)["bleu"] > 80
