"""vec2text checkpoints made on this machine, in the published layout, with vec2text's own classes.

vec2text finds its parts by hub name, and a folder of that name under the working directory comes first: so a
root folder holds `sentence-transformers/gtr-t5-base`, `t5-base`, `jxm/gtr__nq__32` and
`jxm/gtr__nq__32__correct`, and every call into vec2text happens with the root as working directory.
"""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration
from transformers import T5Model as T5ModelForEmbedding

from lvm.codec.gtr import EMBEDDER, GTR_CODECS, MAX_TOKENS
from lvm.codec.tokenizer import train_tokenizer
from lvm.codec.vec2text_package import CODEC, T5, embed, load_vec2text

HYPOTHESIZER, CORRECTOR = GTR_CODECS[CODEC].hypothesizer, GTR_CODECS[CODEC].corrector


@dataclass(frozen=True)
class Sizes:
    """Of the T5 under hypothesizer and corrector, and of the embedder."""

    d_model: int = 96
    num_layers: int = 2
    num_heads: int = 4
    d_kv: int = 24
    d_ff: int = 256
    vocabulary_size: int = 1024
    embedder_layers: int = 1
    embedder_heads: int = 4
    embedder_d_kv: int = 32
    embedder_d_ff: int = 256
    num_repeat_tokens: int = 4
    embedding_std: float = 1.0
    """Of T5's token table. Untrained layers hardly change a state, so with T5's own 1.0 each token is the last one
    again; with less the layers decide, and texts are as varied as the vectors."""


GTR_BASE = Sizes(768, 12, 12, 64, 3072, 32128, 12, 12, 64, 3072, 16, embedding_std=0.05)
"""What jxm/gtr__nq__32 has."""


def make_tokenizer(root: Path, texts: Sequence[str], vocabulary_size: int) -> None:
    """A unigram tokenizer of T5's form, filled up with made-up words where the texts give too few pieces."""
    trained = root / "unigram.json"
    train_tokenizer(texts, min(vocabulary_size, 8192), trained)
    state = json.loads(trained.read_text())
    pieces = state["model"]["vocab"]
    floor = min(score for _, score in pieces) - 1.0
    pieces.extend([f"▁w{i}", floor] for i in range(vocabulary_size - len(pieces)))
    for name in (EMBEDDER, T5):
        PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(state)),
            pad_token="<pad>",
            eos_token="</s>",
            unk_token="<unk>",
        ).save_pretrained(root / name)


def make_checkpoints(root: Path, texts: Sequence[str], sizes: Sizes, seed: int = 0) -> None:
    """Seeded random weights in all four folders under `root`; `fit` makes them write."""
    from vec2text.models import CorrectorEncoderModel, InversionModel
    from vec2text.models.config import InversionConfig

    root.mkdir(parents=True, exist_ok=True)
    make_tokenizer(root, texts, sizes.vocabulary_size)
    shared: dict[str, Any] = {
        "vocab_size": sizes.vocabulary_size,
        "dropout_rate": 0.0,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    torch.manual_seed(seed)
    embedder = T5ModelForEmbedding(
        T5Config(
            **shared,
            d_model=768,
            num_layers=sizes.embedder_layers,
            num_decoder_layers=1,
            num_heads=sizes.embedder_heads,
            d_kv=sizes.embedder_d_kv,
            d_ff=sizes.embedder_d_ff,
        )
    )
    # Untrained attention sees every place alike, and texts of the same words in another order would tie.
    with torch.no_grad():
        attention = embedder.encoder.block[0].layer[0].SelfAttention
        attention.relative_attention_bias.weight.normal_(std=2.0)
    embedder.save_pretrained(root / EMBEDDER)
    writer = T5ForConditionalGeneration(
        T5Config(
            **shared,
            d_model=sizes.d_model,
            num_layers=sizes.num_layers,
            num_heads=sizes.num_heads,
            d_kv=sizes.d_kv,
            d_ff=sizes.d_ff,
        )
    )
    with torch.no_grad():
        writer.shared.weight.mul_(sizes.embedding_std)
    writer.save_pretrained(root / T5)
    config = {
        "model_name_or_path": T5,
        "embedder_model_name": "gtr_base",
        "embedder_model_api": None,
        "embedder_torch_dtype": "float32",
        "embedder_fake_with_zeros": False,
        "embedder_no_grad": True,
        "embeddings_from_layer_n": None,
        "embedder_gaussian_noise_level": 0.0,
        "encoder_dropout_disabled": False,
        "decoder_dropout_disabled": False,
        "use_frozen_embeddings_as_input": False,
        "use_lora": False,
        "max_seq_length": MAX_TOKENS,
        "num_repeat_tokens": sizes.num_repeat_tokens,
        "corrector_ignore_hypothesis_embedding": False,
    }
    with contextlib.chdir(root):
        for name, kind in ((HYPOTHESIZER, InversionModel), (CORRECTOR, CorrectorEncoderModel)):
            kind(InversionConfig(**config)).save_pretrained(root / name)


def fit(root: Path, texts: Sequence[str], steps: int, batch: int = 48, seed: int = 0) -> list[float]:
    """Train hypothesizer, then corrector on its outputs, and save both; the last losses of each."""
    corrector = load_vec2text(root)
    hypothesizer, model = corrector.inversion_trainer.model, corrector.model
    tokenizer = hypothesizer.tokenizer
    generator = torch.Generator().manual_seed(seed)
    batches = tokenizer(
        list(texts), max_length=MAX_TOKENS, truncation=True, padding="max_length", return_tensors="pt"
    )
    vectors = torch.cat([embed(corrector, texts[i : i + 256]) for i in range(0, len(texts), 256)])
    labels = batches.input_ids.masked_fill(batches.attention_mask == 0, -100)
    # All vectors share most of their length, as real GTR's do. Training finds that out, but takes long over it.
    with torch.no_grad():
        firsts = [
            hypothesizer.embedding_transform[0],
            model.embedding_transform_1[0],
            model.embedding_transform_3[0],
        ]
        for first in (*firsts, model.embedding_transform_2[0]):
            first.weight.mul_(4.0)
        for first in firsts:
            first.bias.copy_(-first.weight @ vectors.mean(0))
    losses = []
    for stage, network in enumerate((hypothesizer, model)):
        trained = [p for n, p in network.named_parameters() if not n.startswith("embedder")]
        for p in trained:
            p.requires_grad_(True)
        optimizer = torch.optim.AdamW(trained, lr=2e-3, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        if stage == 1:
            guesses, guess_vectors = _hypotheses(corrector, vectors)
        loss = torch.zeros(())
        for _ in range(steps):
            rows = torch.randint(len(texts), (batch,), generator=generator)
            if stage == 0:
                embeds, mask = network.embed_and_project(None, None, frozen_embeddings=vectors[rows])
            else:
                embeds, mask = network.get_encoder_embedding(
                    vectors[rows], guess_vectors[rows], guesses[rows], (guesses[rows] != 0).long()
                )
            loss = network.encoder_decoder(
                inputs_embeds=embeds, attention_mask=mask, labels=labels[rows]
            ).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
        losses.append(loss.item())
    with contextlib.chdir(root):
        hypothesizer.save_pretrained(root / HYPOTHESIZER)
        model.save_pretrained(root / CORRECTOR)
    return losses


def _hypotheses(corrector: Any, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """The hypothesizer's token ids (N, 32), start token first, and their vectors (N, 768)."""
    ids, own = [], []
    for part in vectors.split(128):
        with torch.no_grad():
            _, guessed, _, embedded = corrector._get_hypothesis_uncached({"frozen_embeddings": part})
        ids.append(torch.nn.functional.pad(guessed, (0, MAX_TOKENS - guessed.shape[1])))
        own.append(embedded)
    return torch.cat(ids), torch.cat(own)
