"""Codecs by name, and where their weights come from.

`mini` ships with the package. Any codec our own training made loads from its folder with `path`.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lvm.codec.identity import CodecIdentity
from lvm.codec.tokenizer import ChunkTokenizer
from lvm.errors import InputError

if TYPE_CHECKING:
    from lvm.codec.encoder import Encoded, TextEncoder
    from lvm.codec.mini import MiniHypothesizer

CODECS = {"mini": Path(__file__).parent / "weights" / "mini"}
"""Codec name to the folder with its weights."""

FILES = ("config.json", "tokenizer.json", "encoder.safetensors", "hypothesizer.safetensors")


@dataclass(frozen=True)
class Decoded:
    """Texts of B vectors, in their order."""

    texts: list[str]
    """What was written for each vector."""
    cosines: npt.NDArray[np.float32]
    """(B,) cosine between each vector and the encoding of its text."""
    steps_used: npt.NDArray[np.int32]
    """(B,) corrector steps taken; 0 for the hypothesizer alone."""


class Codec:
    """An encoder and the decoder trained to invert exactly that encoder."""

    supported_steps: tuple[int, ...] = (0,)
    """Corrector steps `decode` takes; this codec has a hypothesizer alone."""

    def __init__(
        self, identity: CodecIdentity, encoder: "TextEncoder", hypothesizer: "MiniHypothesizer"
    ) -> None:
        self.identity = identity
        self._encoder = encoder
        self._hypothesizer = hypothesizer.to(encoder.device, encoder.dtype).eval()
        self._hypothesizer.rotation.float()  # angles and the running residual stay float32
        # The decode loop multiplies in the encoder's fast dtype; `encode` casts by itself and keeps float32.
        self._table = encoder.network.tokens.weight.detach().to(encoder.dtype)

    @property
    def tokenizer(self) -> ChunkTokenizer:
        """The codec's tokenizer, with its limit."""
        return self._encoder.tokenizer

    def encode(self, texts: list[str]) -> "Encoded":
        """Unit vectors (N, 768) float32 of N texts, with norms, token counts and what was cut."""
        return self._encoder.encode(texts)

    def decode(self, vectors: npt.NDArray[np.float32], steps: int = 0) -> Decoded:
        """Texts of unit vectors (B, 768), with the round-trip cosine of each.

        Raises InputError on a wrong shape, on values that are no numbers, and on steps the codec lacks.
        """
        import torch

        from lvm.codec.inverter import hypothesize

        vectors = np.ascontiguousarray(vectors, np.float32)
        if vectors.ndim != 2 or vectors.shape[1] != self.identity.dim:
            raise InputError(
                f"vectors have shape {vectors.shape}, expected (B, {self.identity.dim}) for codec {self.identity}"
            )
        if steps not in self.supported_steps:
            raise InputError(
                f"codec {self.identity.name} has no corrector: steps must be one of {self.supported_steps}, got {steps}"
            )
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        bad = np.flatnonzero(~np.isfinite(norms[:, 0]) | (norms[:, 0] == 0))
        if bad.size:
            raise InputError(
                f"vector {bad[0]} is zero or holds NaN or infinity ({bad.size} such); expected unit vectors"
            )
        units = vectors / norms
        rows = hypothesize(
            self._table,
            self._hypothesizer,
            torch.from_numpy(units).to(self._encoder.device),
            self.tokenizer.end_id,
        )
        texts = self.tokenizer.decode(rows)
        again = self._encoder.encode(texts).vectors if texts else units
        return Decoded(texts, (units * again).sum(1), np.zeros(len(texts), np.int32))


def codec_folder(name: str, path: str | Path | None = None) -> Path:
    """The folder with a codec's files. Raises InputError on an unknown name or a missing file."""
    if path is None and name not in CODECS:
        raise InputError(
            f"unknown codec {name!r}; expected one of {', '.join(sorted(CODECS))}, "
            "or --codec-path with the folder of a codec trained by `latent train-codec`"
        )
    folder = CODECS[name] if path is None else Path(path)
    missing = [f for f in FILES if not (folder / f).is_file()]
    if missing:
        raise InputError(f"codec folder {folder} lacks {', '.join(missing)}; expected {', '.join(FILES)}")
    return folder


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / "config.json").read_text())
        fields: dict[str, Any] = record["config"]
    except (ValueError, KeyError, TypeError) as err:
        raise InputError(
            f"{folder / 'config.json'} is no codec configuration ({err}); copy the folder again"
        ) from err
    return fields


def load_tokenizer(name: str, path: str | Path | None = None) -> ChunkTokenizer:
    """The tokenizer and token limit of a codec, without loading its weights or torch."""
    folder = codec_folder(name, path)
    return ChunkTokenizer.load(folder / "tokenizer.json", int(_read_config(folder)["max_tokens"]))


def load_codec(name: str, path: str | Path | None = None, device: str = "auto") -> Codec:
    """A codec ready to encode and decode.

    device: "auto" (CUDA, then MPS, then CPU) or a torch device. Raises InputError on an unknown name, missing
    or damaged files, and when the tokenizer is not the one the weights were trained with.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from lvm.codec.encoder import TextEncoder
    from lvm.codec.mini import MiniConfig, MiniEncoder, MiniHypothesizer

    folder = codec_folder(name, path)
    fields = _read_config(folder)
    try:
        config = MiniConfig(**fields)
    except TypeError as err:
        raise InputError(
            f"{folder / 'config.json'}: {err}; it was written by another version, train again"
        ) from err
    tokenizer = ChunkTokenizer.load(folder / "tokenizer.json", config.max_tokens)
    trained_with = json.loads((folder / "config.json").read_text()).get("tokenizer_sha256")
    if trained_with != tokenizer.sha256:
        raise InputError(
            f"{folder / 'tokenizer.json'} has sha256 {tokenizer.sha256[:16]}, the weights were trained with "
            f"{str(trained_with)[:16]}; put the right tokenizer.json there"
        )
    encoder = MiniEncoder(config)
    hypothesizer = MiniHypothesizer(config, encoder.topic_norm)
    digest = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode())
    for file, module in (("encoder", encoder), ("hypothesizer", hypothesizer)):
        try:
            tensors = load_file(folder / f"{file}.safetensors")
            module.load_state_dict(tensors)
        except (SafetensorError, RuntimeError, OSError) as err:
            raise InputError(f"{folder / file}.safetensors does not fit config.json: {err}") from err
        if file == "encoder":
            for key in sorted(tensors):
                digest.update(f"{key} {tuple(tensors[key].shape)} {tensors[key].dtype}".encode())
                digest.update(tensors[key].contiguous().view(torch.uint8).numpy().tobytes())
    identity = CodecIdentity(
        name=name if path is None else Path(path).name,
        encoder_sha256=digest.hexdigest(),
        tokenizer_sha256=tokenizer.sha256,
        pooling="topic-words-order",
        dense=False,
        normalized=True,
        max_tokens=config.max_tokens,
        dim=config.dim,
    )
    return Codec(identity, TextEncoder(encoder, tokenizer, pick_device(device)), hypothesizer)


def pick_device(device: str) -> Any:
    """The torch device of a name; "auto" takes CUDA, then MPS, then CPU."""
    import torch

    if device != "auto":
        try:
            return torch.device(device)
        except RuntimeError as err:
            raise InputError(f"unknown device {device!r}; expected auto, cpu, cuda or mps") from err
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
