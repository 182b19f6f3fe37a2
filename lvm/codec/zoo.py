"""Loads codecs by name.

`mini` ships with the package. `gtr-jxe` and `gtr-ielab` come from the Hugging Face hub or from the folder `path`
(`lvm.codec.gtr`). Codecs made by our own training load from their folder, `path`.
"""

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import Progress

from lvm.arguments import floats, whole
from lvm.codec.gtr import GTR_CODECS, hash_tensors, load_gtr, load_gtr_tokenizer
from lvm.codec.identity import CodecIdentity
from lvm.codec.tokenizer import ChunkTokenizer, require_texts
from lvm.devices import device_for_mini, usable_device
from lvm.errors import InputError

if TYPE_CHECKING:
    from lvm.codec.encoder import Encoded, TextEncoder
    from lvm.codec.inverter import Inverter, Rounds
    from lvm.codec.vec2text_package import PackageInverter
    from lvm.codec.writer import Writer

CODECS = {"mini": Path(__file__).parent / "weights" / "mini"}
"""Name of each shipped codec to the folder with its weights."""

SENTENCE = "sentence-transformers"
"""Codec name for any sentence-transformers model (an encoder, and a writer if one was fitted); its folder is `path`."""

ENGINES = ("lvm", "vec2text")
"""Decode engines: this library, or the vec2text package for comparison."""

MINI_STEPS = (0, 1, 2, 3, 4, 5)
"""Corrector steps that `mini` supports: the first has nearly all the effect, and more than five changed no text."""

FILES = ("config.json", "tokenizer.json", "encoder.safetensors", "hypothesizer.safetensors")


@dataclass(frozen=True)
class Decoded:
    """Texts of B vectors, in their order."""

    texts: list[str]
    """The text of each vector."""
    cosines: npt.NDArray[np.float32]
    """(B,) cosine between each vector and the encoding of its text."""
    steps_used: npt.NDArray[np.int32]
    """(B,) corrector steps taken; 0 for the hypothesizer alone."""


class Codec:
    """An encoder and the decoder trained to invert exactly that encoder."""

    def __init__(
        self,
        identity: CodecIdentity,
        encoder: "TextEncoder",
        inverter: "Inverter | PackageInverter | None",
        scale: float = 1.0,
        supported_steps: tuple[int, ...] | None = None,
        decoder_digest: str = "",
        find_writer: "Callable[[], Writer | str]" = lambda: "this codec has no writer",
    ) -> None:
        """find_writer: loads the writer, or returns the reason why there is none."""
        self.identity = identity
        self.inverter = inverter
        """The decode engine; None for a codec without a decoder."""
        self.scale = scale
        """Norm of the vectors that the decoder was trained on; 1 if the encoder normalises."""
        self.supported_steps = supported_steps
        """Supported numbers of corrector steps: None for any, (0,) without a corrector, () without a decoder."""
        self.decoder_digest = decoder_digest
        """Hash of the decoder's weights: another decoder gives other texts for the same vectors."""
        self._encoder = encoder
        self._find_writer = find_writer

    @cached_property
    def _writer(self) -> "Writer | str":
        return self._find_writer()

    @property
    def writer(self) -> "Writer | None":
        """The writer, for vectors that encode no actual text; loaded on first use. None if there is none (`no_writer`
        says why)."""
        return None if isinstance(self._writer, str) else self._writer

    @property
    def no_writer(self) -> str | None:
        """Why there is no writer and how to get one; None if there is one."""
        return self._writer if isinstance(self._writer, str) else None

    def reading(self) -> "Rounds":
        """A new, empty batch of unit vectors to decode. Raises InputError without a decoder or with engine vec2text."""
        from lvm.codec.inverter import Inverter, Rounds

        inverter = self._require_inverter()
        if not isinstance(inverter, Inverter):
            raise InputError(
                "engine vec2text decodes whole batches and is for comparison; load the codec without it"
            )
        return Rounds(inverter, self.scale)

    def _require_inverter(self) -> "Inverter | PackageInverter":
        if self.inverter is None:
            raise InputError(
                f"codec {self.identity} has only an encoder, no decoder; fit a writer to get text from its vectors "
                "(`latent train-writer`)"
            )
        return self.inverter

    @property
    def tokenizer(self) -> ChunkTokenizer:
        """The codec's tokenizer and token limit."""
        return self._encoder.tokenizer

    def encode(
        self, texts: str | Sequence[str], batch_size: int | None = None, show_progress: bool = False
    ) -> npt.NDArray[np.float32]:
        """Unit vectors, float32: (D,) of one text, (N, D) of a list of N.

        batch_size: maximum texts per batch; None to suit the device. show_progress: show a bar on stderr. Texts longer
        than the codec's token limit are truncated, with a UserWarning; `lvm.chunk` splits them without loss.

        Raises InputError on anything but a str or a sequence of str, and on a batch_size below 1.
        """
        as_list = require_texts(texts)
        if batch_size is not None:
            batch_size = whole("batch_size", batch_size, otherwise=", or None")
        with Progress(console=Console(stderr=True), disable=not show_progress) as progress:
            task = progress.add_task("encode", total=len(as_list))
            encoded = self._encoder.encode(as_list, batch_size, lambda rows: progress.advance(task, rows))
        if encoded.truncated.any():
            warnings.warn(
                f"{int(encoded.truncated.sum())} of {len(as_list)} texts are longer than {self.identity.max_tokens} "
                f"tokens and were truncated, text {int(encoded.truncated.argmax())} first; "
                "lvm.chunk(text, codec) splits them without loss",
                stacklevel=2,
            )
        return encoded.vectors[0] if isinstance(texts, str) else encoded.vectors

    def encode_chunks(self, texts: list[str]) -> "Encoded":
        """Unit vectors (N, D) of N chunks, with norms, token counts and truncation; no warning."""
        return self._encoder.encode(texts)

    def decode(
        self,
        vectors: npt.NDArray[np.float32],
        steps: int | Sequence[int] = 0,
        target_cosine: float | None = None,
        starts: Sequence[str | None] | None = None,
        norms: npt.NDArray[np.float32] | None = None,
    ) -> Decoded:
        """Texts of unit vectors (B, D), or of one (D,), with the round-trip cosine of each.

        steps: maximum corrector steps, for all rows or per row. target_cosine: a row that reaches it takes no further
        steps. starts: texts of near neighbours; each row starts from its start or the hypothesizer's text, whichever
        encodes closer to the vector. norms: (B,) norms of the vectors before normalisation, for a decoder trained on
        unnormalised vectors; None to use the codec's `scale`.

        Raises InputError on a wrong shape, zero, NaN or infinity, on unsupported steps, and without a decoder.
        """
        expected = f"numbers (B, {self.identity.dim}), as encode gives them"
        vectors = np.atleast_2d(floats("vectors", vectors, expected))
        if vectors.ndim != 2 or vectors.shape[1] != self.identity.dim:
            raise InputError(
                f"vectors have shape {vectors.shape}, expected (B, {self.identity.dim}) for codec {self.identity}"
            )
        lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
        bad = np.flatnonzero(~np.isfinite(lengths[:, 0]) | (lengths[:, 0] == 0))
        if bad.size:
            raise InputError(
                f"vector {bad[0]} is zero or holds NaN or infinity ({bad.size} such); expected unit vectors"
            )
        scales = np.full(len(vectors), self.scale, np.float32)
        if norms is not None and not self.identity.normalized:
            scales = np.asarray(norms, np.float32)
            if scales.shape != (len(vectors),) or not (scales > 0).all():
                raise InputError(
                    f"norms have shape {scales.shape} for {len(vectors)} vectors, or are not all above 0; "
                    "give those the encoder returned"
                )
        rescaled = (vectors / lengths).astype(np.float32) * scales[:, None]
        wanted = self._checked_steps(steps)
        if target_cosine is not None and not (isinstance(target_cosine, Real) and -1 <= target_cosine <= 1):
            raise InputError(f"target_cosine is {target_cosine!r}; expected a number from -1 to 1, or None")
        if starts is not None:
            if isinstance(starts, str):
                raise InputError("starts is one str; expected a list with a str or None for each vector")
            require_texts([text for text in starts if text is not None])
        rows = self._require_inverter().invert(rescaled, wanted, target_cosine, starts)
        return Decoded(
            [row.text for row in rows],
            np.array([row.cosine for row in rows], np.float32),
            np.array([row.steps_used for row in rows], np.int32),
        )

    def _checked_steps(self, steps: int | Sequence[int]) -> int | list[int]:
        most = max(self.supported_steps) if self.supported_steps else None
        if isinstance(steps, list | tuple | np.ndarray):
            return [whole("steps", each, 0, most) for each in steps]
        return whole("steps", steps, 0, most, otherwise=", or a list with one for each vector")


def codec_folder(name: str, path: str | Path | None = None) -> Path:
    """The folder with the files of `mini` or of a codec of our training. Raises InputError on an unknown name or a
    missing file."""
    if path is None and name not in CODECS:
        raise InputError(
            f"unknown codec {name!r}; expected one of {', '.join(sorted([*CODECS, *GTR_CODECS, SENTENCE]))}, "
            "or --codec-path with the folder of a codec trained by `latent train-codec`"
        )
    folder = CODECS[name] if path is None else Path(path)
    missing = [f for f in FILES if not (folder / f).is_file()]
    if missing:
        raise InputError(f"codec folder {folder} lacks {', '.join(missing)}; expected {', '.join(FILES)}")
    return folder


def _read_config(folder: Path) -> tuple[dict[str, Any], str | None]:
    """MiniConfig's fields, and the sha256 of the tokenizer that the weights were trained with."""
    try:
        record = json.loads((folder / "config.json").read_text())
        return record["config"], record.get("tokenizer_sha256")
    except (ValueError, KeyError, TypeError) as err:
        raise InputError(
            f"{folder / 'config.json'} is not a codec configuration ({err}); copy the folder again"
        ) from err


def load_tokenizer(name: str, path: str | Path | None = None) -> ChunkTokenizer:
    """A codec's tokenizer and token limit, without loading its weights or torch."""
    if name == SENTENCE and path is not None:
        from lvm.codec.sentence import load_sentence_tokenizer

        return load_sentence_tokenizer(Path(path))
    if name in GTR_CODECS:
        return load_gtr_tokenizer(name, path)
    folder = codec_folder(name, path)
    return ChunkTokenizer.load(folder / "tokenizer.json", int(_read_config(folder)[0]["max_tokens"]))


def load_codec(
    name: str,
    path: str | Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    writer: str | Path | None = None,
    language_model: str | Path | None = None,
    engine: str = "lvm",
) -> Codec:
    """A codec ready to encode and decode.

    path: the codec's folder; not needed for `mini` and the GTR codecs. device: "auto" (CUDA, then MPS except for
    `mini`, then CPU) or a torch device. precision: "float32", "bfloat16", "int8", or "auto" for the fastest that keeps
    the quality. writer: folder of a writer trained by `latent train-writer`; None for `writer/` in the codec's folder.
    language_model: path of the writer's language model (`lvm.codec.language_model.base_file`). engine: "lvm", or for
    comparison "vec2text", the original package (codec gtr-jxe only). Raises InputError on an unknown name, missing or
    damaged files, and a tokenizer other than the one that the weights were trained with.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from lvm.codec.encoder import TextEncoder
    from lvm.codec.inverter import MiniHypothesizing
    from lvm.codec.mini import MiniConfig, MiniEncoder, MiniHypothesizer
    from lvm.codec.runner import best_precision, require_precision
    from lvm.codec.unbind import Unbinder, UnbindingInverter

    where = usable_device(device)
    given_precision = None if precision == "auto" else require_precision(precision)
    if engine not in ENGINES:
        raise InputError(f"unknown engine {engine!r}; expected one of {', '.join(ENGINES)}")
    if engine == "vec2text":
        from lvm.codec import vec2text_package

        if name != vec2text_package.CODEC:
            raise InputError(
                f"engine vec2text decodes only {vec2text_package.CODEC}, got {name!r}; choose that codec or engine lvm"
            )
        codec = load_gtr(name, path, where, precision)
        package = vec2text_package.load_vec2text(path)
        codec.inverter = vec2text_package.PackageInverter(package, codec.tokenizer.decode)
        codec.decoder_digest += " by vec2text"
        return codec
    if name == SENTENCE:
        if path is None:
            raise InputError(
                f"codec {SENTENCE} needs --codec-path with the folder of a model (modules.json, config.json, "
                "tokenizer.json, model.safetensors)"
            )
        from lvm.codec.sentence import load_sentence_encoder

        sentence, identity = load_sentence_encoder(Path(path), where, given_precision or "auto")
        find = partial(find_writer, Path(path), writer, language_model, where, identity)
        return Codec(identity, sentence, None, supported_steps=(), find_writer=find)
    if name in GTR_CODECS:
        own = None if path is None else Path(path)
        find = partial(find_writer, own, writer, language_model, where)
        return load_gtr(name, path, where, precision, find)
    where = device_for_mini(device)
    folder = codec_folder(name, path)
    fields, trained_with = _read_config(folder)
    try:
        config = MiniConfig(**fields)
    except TypeError as err:
        raise InputError(
            f"{folder / 'config.json'}: {err}; it was written by another version, train again"
        ) from err
    tokenizer = ChunkTokenizer.load(folder / "tokenizer.json", config.max_tokens)
    if trained_with != tokenizer.sha256:
        raise InputError(
            f"{folder / 'tokenizer.json'} has sha256 {tokenizer.sha256[:16]}, the weights were trained with "
            f"{str(trained_with)[:16]}; put the right tokenizer.json there"
        )
    encoder = MiniEncoder(config)
    hypothesizer = MiniHypothesizer(config, encoder.topic_norm)
    digests = {}
    for file, module in (("encoder", encoder), ("hypothesizer", hypothesizer)):
        try:
            tensors = load_file(folder / f"{file}.safetensors")
            module.load_state_dict(tensors)
        except (SafetensorError, RuntimeError, OSError) as err:
            raise InputError(f"{folder / file}.safetensors does not fit config.json: {err}") from err
        digests[file] = hash_tensors(tensors, json.dumps(config.to_dict(), sort_keys=True).encode())
    identity = CodecIdentity(
        name=name if path is None else Path(path).name,
        encoder_sha256=digests["encoder"],
        tokenizer_sha256=tokenizer.sha256,
        pooling="topic-words-order",
        dense=False,
        normalized=True,
        max_tokens=config.max_tokens,
        dim=config.dim,
    )
    text_encoder = TextEncoder(encoder, tokenizer, where, given_precision or "auto")
    decode_precision = given_precision or best_precision(where)
    end = tokenizer.end_id
    unbinder = Unbinder(encoder, hypothesizer, tokenizer.log_frequencies(), end, decode_precision)
    hypothesizer.to(where).eval()
    inverter = UnbindingInverter(
        MiniHypothesizing(hypothesizer, encoder, end, decode_precision, unbinder.foresee),
        unbinder,
        lambda texts: text_encoder.encode(texts).vectors,
        tokenizer.decode,
        lambda texts: tokenizer.encode(texts)[0],
        config.max_tokens,
        where,
    )
    return Codec(
        identity,
        text_encoder,
        inverter,
        supported_steps=MINI_STEPS,
        decoder_digest=digests["hypothesizer"],
        find_writer=partial(find_writer, folder, writer, language_model, where, identity),
    )


def find_writer(
    codec: Path | None,
    folder: str | Path | None,
    language_model: str | Path | None,
    device: Any,
    identity: CodecIdentity,
) -> "Writer | str":
    """The writer in `folder`, by default `writer/` in the codec's folder; a text with the reason if there is no writer
    or no language model. Raises InputError if the writer does not load or is for another codec."""
    from lvm.codec.language_model import base_file, load_base, missing_base
    from lvm.codec.writer import Writer

    if folder is None:
        if codec is None or not (codec / "writer" / "writer.json").is_file():
            return f"there is no writer for codec {identity}; fit one with `latent train-writer`"
        folder = codec / "writer"
    if language_model is None and base_file() is None:
        return missing_base()
    base = load_base(None if language_model is None else Path(language_model))
    return Writer(Writer.parts(Path(folder), base, identity), base, device=device)
