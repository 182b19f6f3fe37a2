"""A toy language model, its tokenizer, and a writer on it, for tests that need the real engine and no real weights."""

import hashlib
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lvm.codec.identity import CodecIdentity
from lvm.codec.language_model import END, START, Base
from lvm.codec.llama import TOY, Adapter, Llama, shapes
from lvm.codec.writer import Parts, Prefix, Writer, WriterConfig, WritingSettings, save_writer

WORDS = ("river", "bridge", "steam", "engine", "mill", "coal", "town", "king")


def toy_tokenizer() -> Tokenizer:
    """Bytes and a few words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([START, END, *alphabet])}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        left = "Ġ"
        for letter in word:
            if (left, letter) not in merges:
                merges.append((left, letter))
                vocabulary.setdefault(left + letter, len(vocabulary))
            left += letter
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([START, END])
    return tokenizer


def toy_llama(seed: int = 0) -> Llama:
    """Random weights, float32."""
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.ones(shape)
        if len(shape) == 1
        else torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        for name, shape in shapes(TOY).items()
    }
    weights["embed_tokens.weight"] *= 2
    return Llama(TOY, weights, toy_tokenizer())


def toy_base(seed: int = 0) -> Base:
    """As it would be found on disk."""
    return Base(toy_llama(seed), hashlib.sha256(f"toy {seed}".encode()).hexdigest(), Path("toy.safetensors"))


def toy_identity(dim: int = 24, name: str = "toy") -> CodecIdentity:
    """Of a codec with short vectors."""
    digest = hashlib.sha256(name.encode()).hexdigest()
    return CodecIdentity(name, digest, digest, "mean", False, True, 32, dim)


def toy_writer(folder: Path, dim: int = 24, seed: int = 0, settings: WritingSettings | None = None) -> Writer:
    """A writer with random weights, saved in `folder` and loaded from there."""
    torch.manual_seed(seed)
    base = toy_base()
    config = WriterConfig(
        dim, len(WORDS), evidence_words=3, soft_positions=2, soft_width=16, evidence_width=8, rank=2
    )
    prefix = Prefix(config, base.model, WORDS, torch.arange(TOY.vocab_size))
    prefix.evidence.describe(torch.randn(50, dim), torch.full((len(WORDS),), 1 / len(WORDS)))
    torch.nn.init.normal_(prefix.evidence.outward.weight, std=0.5)
    save_writer(folder, prefix, Adapter(TOY, config.rank), toy_identity(dim), base, {"least_log_prob": -9.0})
    parts: Parts = Writer.parts(folder, base, toy_identity(dim))
    return Writer(parts, base, "float32", settings=settings)
