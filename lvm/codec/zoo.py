"""Codecs by name, and where their weights come from.

`mini` ships with the package. `gtr-jxe` and `gtr-ielab` come from the Hugging Face hub, or from the folder in `path`
(`lvm.codec.gtr`). Any codec our own training made loads from its folder with `path`.
"""

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import Progress

from lvm.codec.gtr import GTR_CODECS, hash_tensors, load_gtr, load_gtr_tokenizer
from lvm.codec.identity import CodecIdentity
from lvm.codec.tokenizer import ChunkTokenizer, require_texts
from lvm.devices import device_for_mini, pick_device
from lvm.errors import InputError

if TYPE_CHECKING:
    from lvm.codec.encoder import Encoded, TextEncoder
    from lvm.codec.inverter import Inverter, Rounds
    from lvm.codec.vec2text_package import PackageInverter
    from lvm.codec.writer import Writer

CODECS = {"mini": Path(__file__).parent / "weights" / "mini"}
"""Codec name to the folder with its weights."""

SENTENCE = "sentence-transformers"
"""Codec name for any sentence-transformers model, in the folder of --codec-path: an encoder, and a writer if fitted."""

ENGINES = ("lvm", "vec2text")
"""Decode engines: this library, or the vec2text package for comparison."""

MINI_STEPS = (0, 1, 2, 3, 4, 5)
"""Corrector steps that `mini` supports; the first has nearly all the effect, and more than five changed no text."""

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
        """scale: norm of the vectors the decoder was trained on; 1 if the encoder normalises.
        decoder_digest: hash of the decoder's weights. find_writer: loads the writer, or returns the reason why
        there is none."""
        self.identity = identity
        self.inverter = inverter
        """The decode engine, for streams of rows (`lvm.codec.inverter.Rounds`); None for a codec without a decoder."""
        self.decoder_digest = decoder_digest
        """Hash of the decoder's weights: another decoder gives other texts for the same vectors."""
        self.scale = scale
        self._encoder = encoder
        self._supported_steps = supported_steps
        self._find_writer = find_writer

    @cached_property
    def _writer(self) -> "Writer | str":
        return self._find_writer()

    @property
    def writer(self) -> "Writer | None":
        """The writer, for vectors that encode no actual text; loaded on first use. None if there is none; `no_writer`
        says why."""
        return None if isinstance(self._writer, str) else self._writer

    @property
    def no_writer(self) -> str | None:
        """Why there is no writer and how to get one; None if there is one."""
        return self._writer if isinstance(self._writer, str) else None

    @property
    def supported_steps(self) -> tuple[int, ...] | None:
        """Supported numbers of corrector steps: None for any, (0,) without a corrector, () without a decoder."""
        return self._supported_steps

    def reading(self) -> "Rounds":
        """A new batch for reading unit vectors back. Raises InputError with engine vec2text, which has no rounds."""
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
        """The codec's tokenizer, with its limit."""
        return self._encoder.tokenizer

    def encode(
        self, texts: str | Sequence[str], batch_size: int | None = None, show_progress: bool = False
    ) -> npt.NDArray[np.float32]:
        """Unit vectors, float32: (D,) of one text, (N, D) of a list of N.

        batch_size: maximum texts per batch; None to suit the device. show_progress: a bar on stderr. Texts above the
        codec's limit are truncated, with a UserWarning; `lvm.chunk` splits them without loss.

        Raises InputError on anything but a str or a sequence of str, naming the index, and on a batch_size below 1.
        """
        several = require_texts(texts)
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
            raise InputError(f"batch_size is {batch_size!r}; expected an integer of 1 or more, or None")
        with Progress(console=Console(stderr=True), disable=not show_progress) as progress:
            task = progress.add_task("encode", total=len(several))
            encoded = self._encoder.encode(several, batch_size, lambda rows: progress.advance(task, rows))
        if encoded.truncated.any():
            warnings.warn(
                f"{int(encoded.truncated.sum())} of {len(several)} texts are longer than {self.identity.max_tokens} "
                f"tokens and were truncated, text {int(encoded.truncated.argmax())} first; "
                "lvm.chunk(text, codec) splits them without loss",
                stacklevel=2,
            )
        return encoded.vectors[0] if isinstance(texts, str) else encoded.vectors

    def encode_chunks(self, texts: list[str]) -> "Encoded":
        """Everything a job stores for N chunks: unit vectors (N, D), norms, token counts and truncation."""
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
        step. starts: texts of near neighbours; each row starts from its start or the hypothesizer's text, whichever is
        nearer. norms: (B,) the original norms of the vectors, if known, for a decoder trained on unnormalised vectors;
        by default it gets the codec's scale.

        Raises InputError on a wrong shape, on NaN or infinity, and on unsupported steps.
        """
        try:
            vectors = np.atleast_2d(np.asarray(vectors, np.float32))
        except (TypeError, ValueError) as err:
            raise InputError(
                f"got {type(vectors).__name__} to decode ({err}); expected numbers (B, {self.identity.dim}), as encode "
                "gives them"
            ) from err
        if vectors.ndim != 2 or vectors.shape[1] != self.identity.dim:
            raise InputError(
                f"vectors have shape {vectors.shape}, expected (B, {self.identity.dim}) for codec {self.identity}"
            )
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
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
        done = self._require_inverter().invert(
            vectors / lengths * scales[:, None], steps, target_cosine, starts
        )
        return Decoded(
            [row.text for row in done],
            np.array([row.cosine for row in done], np.float32),
            np.array([row.steps_used for row in done], np.int32),
        )


def codec_folder(name: str, path: str | Path | None = None) -> Path:
    """The folder with a codec's files. Raises InputError on an unknown name or a missing file."""
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


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / "config.json").read_text())
        fields: dict[str, Any] = record["config"]
    except (ValueError, KeyError, TypeError) as err:
        raise InputError(
            f"{folder / 'config.json'} is not a codec configuration ({err}); copy the folder again"
        ) from err
    return fields


def load_tokenizer(name: str, path: str | Path | None = None) -> ChunkTokenizer:
    """The tokenizer and token limit of a codec, without loading its weights or torch."""
    if name == SENTENCE and path is not None:
        from lvm.codec.sentence import load_sentence_tokenizer

        return load_sentence_tokenizer(Path(path))
    if name in GTR_CODECS:
        return load_gtr_tokenizer(name, path)
    folder = codec_folder(name, path)
    return ChunkTokenizer.load(folder / "tokenizer.json", int(_read_config(folder)["max_tokens"]))


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

    device: "auto" (CUDA, then MPS except for `mini`, then CPU) or a torch device. precision: "float32", "bfloat16",
    "int8", or "auto" for the fastest that keeps the quality. writer: folder of a writer trained by `latent
    train-writer`; by default the one in the codec's folder. language_model: the writer's language model
    (`lvm.codec.language_model.load_base`). engine: decode engine, "lvm" or, for comparison, "vec2text", the original
    package (codec gtr-jxe). Raises InputError on an unknown name, missing or damaged files, and when the tokenizer is
    not the one the weights were trained with.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from lvm.codec.encoder import TextEncoder
    from lvm.codec.inverter import MiniHypothesizing
    from lvm.codec.mini import MiniConfig, MiniEncoder, MiniHypothesizer
    from lvm.codec.runner import best_precision, require_precision
    from lvm.codec.unbind import Unbinder, UnbindingInverter

    where = pick_device(device)
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

        how = "auto" if precision == "auto" else require_precision(precision)
        sentence, identity = load_sentence_encoder(Path(path), where, how)
        find = partial(find_writer, Path(path), writer, language_model, where, identity)
        return Codec(identity, sentence, None, supported_steps=(), find_writer=find)
    if name in GTR_CODECS:
        own = None if path is None else Path(path)
        return load_gtr(
            name, path, where, precision, partial(find_writer, own, writer, language_model, where)
        )
    where = device_for_mini(device)
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
    text_encoder = TextEncoder(
        encoder, tokenizer, where, "auto" if precision == "auto" else require_precision(precision)
    )
    unbinder = Unbinder(
        encoder,
        hypothesizer,
        tokenizer.log_frequencies(),
        tokenizer.end_id,
        best_precision(where) if precision == "auto" else require_precision(precision),
    )
    inverter = UnbindingInverter(
        MiniHypothesizing(
            hypothesizer.to(where).eval(),
            encoder,
            tokenizer.end_id,
            best_precision(where) if precision == "auto" else require_precision(precision),
            unbinder.foresee,
        ),
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
        find_writer=lambda: find_writer(folder, writer, language_model, where, identity),
    )


def find_writer(
    codec: Path | None,
    folder: str | Path | None,
    language_model: str | Path | None,
    device: Any,
    identity: CodecIdentity,
) -> "Writer | str":
    """The writer in `folder`, else in `writer/` of the codec's folder; if there is none and no folder was given, the
    reason as text. Raises InputError if the given one does not load or is for another codec."""
    from lvm.codec.language_model import base_file, load_base, missing_base
    from lvm.codec.writer import Writer

    own = None if codec is None else codec / "writer"
    if folder is None and (own is None or not (own / "writer.json").is_file()):
        return f"there is no writer for codec {identity}; fit one with `latent train-writer`"
    asked = None if language_model is None else Path(language_model)
    if asked is None and base_file() is None:
        return missing_base()
    base = load_base(asked)
    where = Path(folder) if folder is not None else own
    assert where is not None
    return Writer(Writer.parts(where, base, identity), base, device=device)
