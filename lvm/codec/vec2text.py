"""vec2text's hypothesizer and corrector, loaded from its checkpoints and run by our decode loop.

A folder holds `config.json` and `model.safetensors` (or its sharded form), as saved by `InversionModel` and
`CorrectorEncoderModel` of vec2text 0.0.13 (Morris et al. 2023, arXiv:2310.06816). Sizes come from the shapes of the
weights, since the T5 configuration is not in the folder.

- The hypothesizer projects a vector to n input embeddings of T5's encoder.
- The corrector's encoder gets, through one layer norm: sep, n embeddings of the vector, sep, n of the hypothesis'
  vector, sep, n of their difference, sep, then the decoder's start token and the hypothesis' tokens.

Letters: B rows, S memory positions, D vector length, L T5's width, n embeddings per vector.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lvm.codec.runner import Matrix, Precision, StackRunner
from lvm.codec.t5 import T5Config, T5Stack
from lvm.errors import InputError

START_ID = PAD_ID = 0
"""T5 starts its decoder with the padding token."""
END_ID = 1
"""T5's end of sequence, also vec2text's separator."""


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors. Raises InputError when there are none or a file is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    index = folder / "model.safetensors.index.json"
    try:
        if index.is_file():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            names = ["model.safetensors"]
        tensors: dict[str, Tensor] = {}
        for name in names:
            tensors |= load_file(folder / name)
    except FileNotFoundError as err:
        pickled = sorted(p.name for p in folder.glob("*.bin"))
        also = f" ({', '.join(pickled)} is a pickle, which is never loaded: convert it)" if pickled else ""
        raise InputError(
            f"{folder} has no model.safetensors{also}; copy the checkpoint's files there"
        ) from err
    except (SafetensorError, ValueError, KeyError, OSError) as err:
        raise InputError(f"the weights in {folder} cannot be read: {err}; copy the folder again") from err
    return tensors


def read_config(folder: Path) -> dict[str, Any]:
    """A checkpoint's config.json. Raises InputError when it is missing or not a JSON object."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError as err:
        raise InputError(f"no {path}; expected a folder saved by vec2text") from err
    except ValueError as err:
        raise InputError(f"{path} is not JSON ({err}); copy the folder again") from err
    if not isinstance(config, dict):
        raise InputError(f"{path} holds a {type(config).__name__}, expected an object; copy the folder again")
    return config


def read_stack(tensors: Mapping[str, Tensor], prefix: str, is_decoder: bool, where: Path) -> T5Stack:
    """The T5 v1.0 stack whose tensors start with `prefix`. Raises InputError when there is none.

    where: the folder, for messages.
    """
    own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    own.pop("embed_tokens.weight", None)  # the shared table under another name
    if any(".wi_0." in name for name in own):
        raise InputError(
            f"{where} holds a T5 v1.1 stack (gated feed-forward); expected T5 v1.0, as t5-base and GTR have"
        )
    try:
        num_buckets, num_heads = own["block.0.layer.0.SelfAttention.relative_attention_bias.weight"].shape
        inner, d_model = own["block.0.layer.0.SelfAttention.q.weight"].shape
        d_ff = own[f"block.0.layer.{2 if is_decoder else 1}.DenseReluDense.wi.weight"].shape[0]
        num_layers = 1 + max(int(name.split(".")[1]) for name in own if name.startswith("block."))
        config = T5Config(d_model, inner // num_heads, num_heads, d_ff, num_layers, is_decoder, num_buckets)
        stack = T5Stack(config)
        stack.load_state_dict(own)
    except (KeyError, ValueError, RuntimeError) as err:
        raise InputError(
            f"{where} holds no T5 stack under {prefix!r}: {err}; expected a vec2text checkpoint"
        ) from err
    return stack.float().eval()


def _need(tensors: Mapping[str, Tensor], name: str, where: Path) -> Tensor:
    if name not in tensors:
        raise InputError(f"{where} lacks the tensor {name}; expected a vec2text checkpoint")
    return tensors[name].float()


class _Projection:
    """Linear, GELU, Linear: (B, D) to (B, n, L). In float32: it is small and runs once per row."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str, width: int, where: Path) -> None:
        # The second Linear is number 2 in early checkpoints, and 3 in those with a dropout layer.
        last = "2" if f"{prefix}.2.weight" in tensors else "3"
        self.first, self.last = (
            (
                _need(tensors, f"{prefix}.{number}.weight", where),
                _need(tensors, f"{prefix}.{number}.bias", where),
            )
            for number in ("0", last)
        )
        self.width = width

    @property
    def dim(self) -> int:
        """Length of the vectors, D."""
        return self.first[0].shape[1]

    def __call__(self, vectors: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(vectors, *self.first)), *self.last).view(len(vectors), -1, self.width)

    def to(self, device: torch.device) -> None:
        self.first = self.first[0].to(device), self.first[1].to(device)
        self.last = self.last[0].to(device), self.last[1].to(device)


class _Seq2Seq:
    """The T5 encoder-decoder of hypothesizer or corrector, for inference."""

    def __init__(
        self, tensors: Mapping[str, Tensor], where: Path, precision: Precision, device: torch.device
    ) -> None:
        prefix = "encoder_decoder."
        # Tied tables are saved once, under any of these names.
        tied = ("shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head")
        present = [name for n in tied if (name := f"{prefix}{n}.weight") in tensors]
        if not present:
            raise InputError(
                f"{where} holds no token table ({prefix}shared.weight); expected a vec2text checkpoint"
            )
        self.table = tensors[present[0]].float().to(device)
        self.width = self.table.shape[1]
        encoder = read_stack(tensors, f"{prefix}encoder.", False, where).to(device)
        decoder = read_stack(tensors, f"{prefix}decoder.", True, where).to(device)
        self.encoder, self.decoder = StackRunner(encoder, precision), StackRunner(decoder, precision)
        # T5 v1.0 multiplies the last state by L^-1/2 before the tied head. This changes scores, not the argmax.
        self.head = Matrix(self.table * self.width**-0.5, precision)
        self.device = device


class _Checkpoint:
    """A configuration and a T5, the parts that vec2text's two models share."""

    def __init__(self, folder: str | Path, precision: Precision, device: torch.device | None = None) -> None:
        """Load `folder`. Raises InputError when it is not a checkpoint of this model."""
        folder = Path(folder)
        device = device or torch.device("cpu")
        self.config = read_config(folder)
        tensors = read_weights(folder)
        self.t5 = _Seq2Seq(tensors, folder, precision, device)
        self._read(tensors, folder, device)

    def _read(self, tensors: Mapping[str, Tensor], folder: Path, device: torch.device) -> None:
        """Load the parts specific to the model."""
        raise NotImplementedError


class Hypothesizer(_Checkpoint):
    """vec2text's InversionModel: vectors to first texts."""

    def _read(self, tensors: Mapping[str, Tensor], folder: Path, device: torch.device) -> None:
        self.transform = _Projection(tensors, "embedding_transform", self.t5.width, folder)
        self.transform.to(device)

    @property
    def dim(self) -> int:
        """Length of the vectors, D."""
        return self.transform.dim

    def memory(self, vectors: Tensor) -> tuple[Tensor, None]:
        """The decoder's memory for vectors (B, D), (B, n, L), and no mask."""
        return self.t5.encoder.encode(self.transform(vectors)), None


class Corrector(_Checkpoint):
    """vec2text's CorrectorEncoderModel: vectors, hypotheses and their vectors to better texts."""

    def _read(self, tensors: Mapping[str, Tensor], folder: Path, device: torch.device) -> None:
        self.transforms = [
            _Projection(tensors, f"embedding_transform_{i}", self.t5.width, folder) for i in (1, 2, 3)
        ]
        for transform in self.transforms:
            transform.to(device)
        self.norm = nn.LayerNorm(self.t5.width)
        with torch.no_grad():
            self.norm.weight.copy_(_need(tensors, "layernorm.weight", folder))
            self.norm.bias.copy_(_need(tensors, "layernorm.bias", folder))
        self.norm.to(device).requires_grad_(False)
        self.ignores_hypothesis_vector = bool(self.config.get("corrector_ignore_hypothesis_embedding"))

    @property
    def dim(self) -> int:
        """Length of the vectors, D."""
        return self.transforms[0].dim

    def memory(
        self, vectors: Tensor, hypothesis_vectors: Tensor, hypotheses: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Tensor]:
        """The decoder's memory, (B, S, L), and its mask, (B, S) bool, True on real positions.

        vectors, hypothesis_vectors: (B, D) float32, not normalised. hypotheses: B lists of token ids, without the start
        token.
        """
        B, table = len(vectors), self.t5.table
        if self.ignores_hypothesis_vector:
            hypothesis_vectors = vectors
        length = 1 + max(len(ids) for ids in hypotheses)
        padded = torch.full((B, length), PAD_ID, dtype=torch.int64)
        for row, ids in enumerate(hypotheses):
            padded[row, 1 : 1 + len(ids)] = torch.as_tensor(ids, dtype=torch.int64)
        # vec2text masks by id, so the start token, which is the padding token, is masked too.
        real = (padded != PAD_ID).to(self.t5.device)
        target, difference, hypothesis = (
            transform(v)
            for transform, v in zip(
                self.transforms, (vectors, vectors - hypothesis_vectors, hypothesis_vectors), strict=True
            )
        )
        sep = table[END_ID].expand(B, 1, -1)
        tokens = F.embedding(padded.to(self.t5.device), table)
        parts = (sep, target, sep, hypothesis, sep, difference, sep, tokens)
        states = self.norm(torch.cat(parts, dim=1))
        mask = torch.cat((real.new_ones(B, states.shape[1] - length), real), dim=1)
        return self.t5.encoder.encode(states, mask), mask
