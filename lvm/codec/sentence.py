"""sentence-transformers encoders, loaded from a folder in that library's layout.

Reads `modules.json`, `config.json`, `tokenizer.json`, `model.safetensors` and the folders that `modules.json` names.
Supports a transformer, mean or [CLS] pooling, Dense layers and normalisation, which covers nearly all published models.
Never reads a pickle.

Letters: B texts, T tokens, D vector length.
"""

import json
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lvm.codec.encoder import Sizes, TextEncoder
from lvm.codec.gtr import hash_tensors, read_json
from lvm.codec.identity import CodecIdentity
from lvm.codec.runner import Precision
from lvm.codec.tokenizer import ChunkTokenizer
from lvm.errors import InputError

ACTIVATIONS = {
    "torch.nn.modules.activation.Tanh": torch.tanh,
    "torch.nn.modules.linear.Identity": lambda x: x,
}
"""Supported activations of a Dense layer, by the name that sentence-transformers writes."""


class SentenceNetwork(nn.Module):
    """Token ids to vectors: a transformer, pooling, and the layers after it."""

    def __init__(
        self, transformer: nn.Module, pooling: str, dense: list[tuple[nn.Linear, str]], normalised: bool
    ) -> None:
        """pooling: "mean" or "cls"; dense: layers after it, each with the name of its activation."""
        super().__init__()
        self.transformer = transformer
        self.pooling, self.normalised = pooling, normalised
        self.dense = nn.ModuleList(layer for layer, _ in dense)
        self.activations = [name for _, name in dense]
        width: int = transformer.config.hidden_size  # type: ignore[union-attr, assignment]
        self.config = Sizes(dense[-1][0].out_features if dense else width)

    def forward(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """ids (B, T) int64 and mask (B, T) bool, None without padding, to (B, D) float32."""
        real = torch.ones_like(ids) if mask is None else mask.long()
        states: Tensor = self.transformer(input_ids=ids, attention_mask=real).last_hidden_state.float()
        if self.pooling == "cls":
            pooled = states[:, 0]
        else:
            pooled = (states * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        for layer, activation in zip(self.dense, self.activations, strict=True):
            pooled = ACTIVATIONS[activation](layer(pooled))
        return F.normalize(pooled, dim=-1) if self.normalised else pooled


def load_sentence_network(folder: Path) -> SentenceNetwork:
    """The network in a model's folder, float32, on the CPU.

    Raises InputError when a file is missing or a module is of an unsupported kind.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModel

    for file in ("modules.json", "config.json", "model.safetensors"):
        if not (folder / file).is_file():
            raise InputError(
                f"{folder} has no {file}; expected the folder of a sentence-transformers model (modules.json, "
                "config.json, tokenizer.json, model.safetensors)"
            )
    try:
        modules = json.loads((folder / "modules.json").read_text())
        kinds = [(str(m["type"]).rsplit(".", 1)[-1], folder / m["path"]) for m in modules]
    except (ValueError, KeyError, TypeError) as err:
        raise InputError(
            f"{folder / 'modules.json'} is not a list of modules ({err}); copy the folder again"
        ) from err
    pooling, dense, normalised = "mean", [], False
    for kind, path in kinds:
        if kind == "Pooling":
            pooling = _pooling(path / "config.json")
        elif kind == "Dense":
            settings = read_json(path / "config.json")
            activation = str(settings.get("activation_function", "torch.nn.modules.activation.Tanh"))
            if activation not in ACTIVATIONS:
                raise InputError(f"{path} ends in {activation}; expected one of {', '.join(ACTIVATIONS)}")
            has_bias = bool(settings.get("bias", True))
            layer = nn.Linear(settings["in_features"], settings["out_features"], has_bias)
            try:
                weights = load_file(path / "model.safetensors")
                layer.load_state_dict({k.removeprefix("linear."): v for k, v in weights.items()})
            except (OSError, SafetensorError, RuntimeError) as err:
                raise InputError(f"{path / 'model.safetensors'} does not fit its config.json: {err}") from err
            dense.append((layer, activation))
        elif kind == "Normalize":
            normalised = True
        elif kind != "Transformer":
            raise InputError(
                f"{folder} has a module {kind}; expected only Transformer, Pooling, Dense and Normalize"
            )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        transformer: Any = AutoModel.from_pretrained(
            folder, config=config, local_files_only=True, use_safetensors=True, dtype=torch.float32
        )
    except (OSError, ValueError, RuntimeError) as err:
        raise InputError(f"transformers cannot load a model from {folder}: {err}") from err
    return SentenceNetwork(transformer.eval(), pooling, dense, normalised)


CHUNK_TOKENS = 40
"""Maximum tokens of a chunk, special ones included, unless the model takes fewer: about what a writer can write."""


def load_sentence_tokenizer(folder: Path, max_tokens: int | None = CHUNK_TOKENS) -> ChunkTokenizer:
    """The model's tokenizer. Its token limit is `max_tokens` or the model's own limit (`max_seq_length`, else the
    number of positions), whichever is smaller."""
    settings = folder / "sentence_bert_config.json"
    own = read_json(settings).get("max_seq_length") if settings.is_file() else None
    own = int(own or read_json(folder / "config.json").get("max_position_embeddings") or 512)
    return ChunkTokenizer.load(folder / "tokenizer.json", own if max_tokens is None else min(own, max_tokens))


def load_sentence_encoder(
    folder: Path, device: torch.device, precision: Precision | Literal["auto"] = "auto"
) -> tuple[TextEncoder, CodecIdentity]:
    """The encoder in a model's folder and its identity. Raises InputError as `load_sentence_network` does."""
    network = load_sentence_network(folder)
    tokenizer = load_sentence_tokenizer(folder)
    identity = CodecIdentity(
        name=folder.resolve().name,
        encoder_sha256=hash_tensors(network.state_dict()),
        tokenizer_sha256=tokenizer.sha256,
        pooling=network.pooling,
        dense=bool(network.activations),
        normalized=network.normalised,
        max_tokens=tokenizer.max_tokens,
        dim=network.config.dim,
    )
    # int8 is implemented for our own networks only; elsewhere it means float32.
    encoder = TextEncoder(network, tokenizer, device, "bfloat16" if precision == "bfloat16" else "float32")
    if precision == "auto" and (device.type == "cuda" or torch.cpu.get_capabilities().get("avx512_bf16")):
        encoder.use_if_close("bfloat16")
    return encoder, identity


def _pooling(path: Path) -> str:
    settings = read_json(path)
    chosen = [k for k, v in settings.items() if k.startswith("pooling_mode_") and v]
    names = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    if len(chosen) != 1 or chosen[0] not in names:
        raise InputError(f"{path} asks for {chosen or 'no pooling'}; expected one of {', '.join(names)}")
    return names[chosen[0]]
