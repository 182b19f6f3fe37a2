"""The two public GTR codecs: one T5 encoder, pooled in two ways, and the decoders trained for each.

- `gtr-jxe`: the T5 encoder of sentence-transformers/gtr-t5-base with mean pooling only, as in vec2text's API. Decoders
  jxm/gtr__nq__32 and jxm/gtr__nq__32__correct.
- `gtr-ielab`: the whole sentence-transformers model: mean pooling, Dense, L2 normalisation. Decoders of ielabgroup.

Vectors of the two are unrelated, although their encoders have the same name; so they are two codecs.

Files are read in their published layout. With `--codec-path DIR` they are in DIR under the name of their repository
(DIR/sentence-transformers/gtr-t5-base/config.json and so on); without it, they are downloaded from the Hugging Face hub
into its cache. Weights are read from safetensors only, never from pickles.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from lvm.codec.identity import CodecIdentity
from lvm.codec.tokenizer import ChunkTokenizer
from lvm.errors import InputError

if TYPE_CHECKING:
    from lvm.codec.encoder import TextEncoder
    from lvm.codec.runner import Precision
    from lvm.codec.zoo import Codec

EMBEDDER = "sentence-transformers/gtr-t5-base"


@dataclass(frozen=True)
class GtrContract:
    """The repositories of a codec, and whether Dense and normalisation follow the pooling."""

    hypothesizer: str
    """Repository of vec2text's InversionModel."""
    corrector: str
    """Repository of vec2text's CorrectorEncoderModel."""
    whole: bool
    """Whether Dense and normalisation follow the pooling, as in sentence-transformers."""

    @property
    def files(self) -> dict[str, tuple[str, ...]]:
        """Repository to the files needed from it."""
        tail = ("modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors")
        weights = ("config.json", "model.safetensors")
        return {
            EMBEDDER: (*weights, "tokenizer.json", *(tail if self.whole else ())),
            self.hypothesizer: weights,
            self.corrector: weights,
        }


GTR_CODECS = {
    "gtr-jxe": GtrContract("jxm/gtr__nq__32", "jxm/gtr__nq__32__correct", whole=False),
    "gtr-ielab": GtrContract(
        "ielabgroup/vec2text_gtr-base-st_inversion", "ielabgroup/vec2text_gtr-base-st_corrector", whole=True
    ),
}
"""Codec name to its repositories."""

MAX_TOKENS = 32
"""Maximum tokens of the texts that both pairs of decoders were trained on, end included (`max_seq_length`)."""

SCALE_TEXTS = (
    "The river rises in the hills north of the town and flows for forty miles before it reaches the sea.",
    "In 1871 the company opened a second factory, where it made engines for ships and for railways.",
    "Most of the species live in warm, shallow water, and feed on plankton during the night.",
    "She studied law in Vienna, but gave it up after two years and turned to painting.",
    "A function is continuous if small changes of its argument lead to small changes of its value.",
    "The treaty was signed in March, and both armies withdrew from the valley by the end of summer.",
    "Critics praised the songs for their simple melodies, although the album did not sell well.",
    "Heat the oil, add the onions, and stir for five minutes until they are soft and golden.",
)
"""The mean norm of these texts' vectors is the scale of a decoder trained on unnormalised vectors."""


def repository_folders(name: str, path: str | Path | None, only: str | None = None) -> dict[str, Path]:
    """Repository to the local folder with its files, in `path` or downloaded from the hub.

    only: the one repository needed; None for all of the codec's. Raises InputError naming all missing files and where
    to put them.
    """
    wanted = {r: files for r, files in GTR_CODECS[name].files.items() if only in (None, r)}
    if path is None:
        return {r: _from_hub(name, r, files) for r, files in wanted.items()}
    root = Path(path)
    missing = {r: [f for f in files if not _present(root / r, f)] for r, files in wanted.items()}
    if any(missing.values()):
        to_do = _what_to_fetch(missing, str(root)) + _how_to_convert(root, missing)
        raise InputError(f"codec {name} is incomplete in {root}; {to_do}")
    return {r: root / r for r in wanted}


def _present(folder: Path, file: str) -> bool:
    # Large checkpoints are split into several files with an index.
    return (folder / file).is_file() or (folder / f"{file}.index.json").is_file()


def _what_to_fetch(missing: dict[str, list[str]], root: str) -> str:
    wanted = {repository: ", ".join(files) for repository, files in missing.items() if files}
    parts = [f"{files} of https://huggingface.co/{r} to {root}/{r}/" for r, files in wanted.items()]
    return "download " + "; ".join(parts)


def _how_to_convert(root: Path, missing: dict[str, list[str]]) -> str:
    """Advice on missing weights that are there as a pickle; empty if none are."""
    weights = [root / r / f for r, files in missing.items() for f in files if f.endswith("model.safetensors")]
    pickles = [str(p) for f in weights if (p := f.with_name("pytorch_model.bin")).is_file()]
    if not pickles:
        return ""
    return (
        f". {', '.join(pickles)} is a pickle and is never loaded; convert it on a machine where you trust it: "
        'python -c "import torch, safetensors.torch as s; s.save_file({k: v.contiguous() for k, v in '
        "torch.load('pytorch_model.bin', weights_only=True).items()}, 'model.safetensors')\""
    )


def _from_hub(name: str, repository: str, files: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [p for f in files for p in (f, *_shards(f))]
    cause: Exception | None = None
    try:
        folder = Path(snapshot_download(repository, allow_patterns=patterns))
        missing = [f for f in files if not _present(folder, f)]
        problem = f"the hub's copy lacks {', '.join(missing)}" if missing else ""
    except Exception as err:  # the hub's client raises its own, the HTTP client's and the system's errors
        cause, problem = err, f"{type(err).__name__}: {str(err).splitlines()[0] if str(err) else ''}"
    if problem:
        whole = {r: list(f) for r, f in GTR_CODECS[name].files.items()}
        raise InputError(
            f"codec {name} needs {repository}, which could not be downloaded ({problem}). Without network, "
            f"{_what_to_fetch(whole, 'DIR')}; then give --codec-path DIR"
        ) from cause
    return folder


def _shards(file: str) -> tuple[str, ...]:
    stem, dot, suffix = file.rpartition(".")
    return (f"{file}.index.json", f"{stem}-*{dot}{suffix}") if suffix == "safetensors" else ()


def load_gtr_tokenizer(name: str, path: str | Path | None = None) -> ChunkTokenizer:
    """The tokenizer of a GTR codec, without loading weights. Raises InputError if it is missing or does not add T5's
    end token."""
    if path is None:
        folder = _from_hub(name, EMBEDDER, ("tokenizer.json",))
    else:
        folder = Path(path) / EMBEDDER
        if not (folder / "tokenizer.json").is_file():
            to_do = _what_to_fetch({EMBEDDER: ["tokenizer.json"]}, str(path))
            raise InputError(f"codec {name} is incomplete in {path}; {to_do}")
    tokenizer = ChunkTokenizer.load(folder / "tokenizer.json", MAX_TOKENS)
    ids, _ = tokenizer.encode(["text"])
    if ids[0][-1:] != [tokenizer.end_id]:
        raise InputError(
            f"{folder / 'tokenizer.json'} does not end a text with </s>, got ids {ids[0]}; expected T5's tokenizer"
        )
    return tokenizer


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises InputError when it is missing or invalid."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as err:
        raise InputError(f"{path} cannot be read as JSON ({err}); copy the folder again") from err


def _require_modules(folder: Path) -> None:
    """Raise InputError unless the model is a transformer, mean pooling, a linear Dense and normalisation."""
    modules = read_json(folder / "modules.json")
    try:
        kinds = [str(m["type"]).rsplit(".", 1)[-1] for m in modules]
    except (TypeError, KeyError) as err:
        raise InputError(
            f"{folder / 'modules.json'} is not a list of modules; copy the folder again"
        ) from err
    expected = ["Transformer", "Pooling", "Dense", "Normalize"]
    if kinds != expected:
        raise InputError(
            f"{folder / 'modules.json'} lists {', '.join(kinds) or 'nothing'}; expected {', '.join(expected)}, "
            f"as {EMBEDDER} has"
        )
    pooling = read_json(folder / "1_Pooling" / "config.json")
    # sentence-transformers wrote one flag per mode before version 5; later versions may name the mode.
    flags = {k.removeprefix("pooling_mode_") for k, on in pooling.items() if on is True and "mode_" in k}
    modes = flags or {str(pooling.get("pooling_mode"))}
    if modes not in ({"mean_tokens"}, {"mean"}):
        raise InputError(
            f"{folder / '1_Pooling' / 'config.json'} pools by {', '.join(sorted(modes))}; expected mean_tokens only"
        )
    activation = str(read_json(folder / "2_Dense" / "config.json").get("activation_function", ""))
    if not activation.endswith("Identity"):
        raise InputError(
            f"{folder / '2_Dense' / 'config.json'} has activation {activation or 'none'}; expected Identity"
        )


def load_gtr_encoder(
    name: str, path: str | Path | None, device: Any, precision: "Precision | Literal['auto']" = "auto"
) -> tuple["TextEncoder", CodecIdentity]:
    """Encoder of a GTR codec and its identity. precision: as in `TextEncoder`.

    Raises InputError on missing or damaged files and on modules other than the codec's.
    """
    from lvm.codec.encoder import GtrEncoder, TextEncoder
    from lvm.codec.vec2text import read_stack, read_weights

    contract = GTR_CODECS[name]
    folder = repository_folders(name, path, only=EMBEDDER)[EMBEDDER]
    tensors = read_weights(folder)
    tables = [n for n in ("shared.weight", "encoder.embed_tokens.weight") if n in tensors]
    if not tables:
        raise InputError(f"{folder} holds no token table (shared.weight); expected the files of {EMBEDDER}")
    stack = read_stack(tensors, "encoder.", False, folder)
    # The table may be saved under either name or both. A decoder in the file does not enter the hash.
    used = {n: t for n, t in tensors.items() if n.startswith("encoder.") and n not in tables}
    used["table"] = tensors[tables[0]]
    dense = None
    if contract.whole:
        _require_modules(folder)
        dense_tensors = read_weights(folder / "2_Dense")
        weight, bias = dense_tensors.get("linear.weight"), dense_tensors.get("linear.bias")
        if weight is None or weight.ndim != 2 or weight.shape[1] != stack.config.d_model:
            raise InputError(
                f"{folder / '2_Dense'} has linear.weight {None if weight is None else tuple(weight.shape)}; expected "
                f"(768, {stack.config.d_model})"
            )
        dense = (weight.float(), None if bias is None else bias.float())
        used |= {f"dense.{n}": t for n, t in dense_tensors.items()}
    network = GtrEncoder(tensors[tables[0]].float(), stack, dense, normalised=contract.whole)
    tokenizer = load_gtr_tokenizer(name, path)
    if tokenizer.vocabulary_size > network.table.shape[0]:
        raise InputError(
            f"{folder / 'tokenizer.json'} has {tokenizer.vocabulary_size} ids, the weights have only "
            f"{network.table.shape[0]}; put the right tokenizer.json there"
        )
    identity = CodecIdentity(
        name=name,
        encoder_sha256=hash_tensors(used),
        tokenizer_sha256=tokenizer.sha256,
        pooling="mean",
        dense=contract.whole,
        normalized=contract.whole,
        max_tokens=MAX_TOKENS,
        dim=network.config.dim,
    )
    return TextEncoder(network, tokenizer, device, precision), identity


def hash_tensors(tensors: dict[str, Any], prefix: bytes = b"") -> str:
    """SHA-256 over `prefix` and the tensors' names, shapes, dtypes and bytes, 64 hex digits."""
    import torch

    digest = hashlib.sha256(prefix)
    for key in sorted(tensors):
        digest.update(f"{key} {tuple(tensors[key].shape)} {tensors[key].dtype}".encode())
        digest.update(tensors[key].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_gtr(
    name: str,
    path: str | Path | None = None,
    device: Any = None,
    precision: str = "auto",
    find_writer: Any = None,
) -> "Codec":
    """A GTR codec ready to encode and decode.

    device: a torch device, the CPU by default. precision: as in `load_codec`. find_writer: called with the identity;
    loads the writer. Stored and predicted vectors have unit norm, so they are rescaled for the decoder: by 1 for
    `gtr-ielab`, by the mean norm of SCALE_TEXTS for `gtr-jxe`. Raises InputError on missing or damaged files and when
    the decoders' token limit or vector length is not the codec's.
    """
    import torch

    from lvm.codec.encoder import GtrEncoder, TextEncoder
    from lvm.codec.inverter import Inverter, Vec2TextHypothesizing
    from lvm.codec.runner import best_precision, require_precision
    from lvm.codec.vec2text import Corrector, Hypothesizer, read_config
    from lvm.codec.zoo import Codec

    contract = GTR_CODECS[name]
    where = device if device is not None else torch.device("cpu")
    folders = repository_folders(name, path)
    for repository in (contract.hypothesizer, contract.corrector):
        limit = read_config(folders[repository]).get("max_seq_length", MAX_TOKENS)
        if limit != MAX_TOKENS:
            raise InputError(
                f"{folders[repository]} was trained on {limit} tokens; expected {MAX_TOKENS} for codec {name}"
            )
    given_precision = None if precision == "auto" else require_precision(precision)
    encoder, identity = load_gtr_encoder(name, path, where, given_precision or "auto")
    decode_precision = given_precision or best_precision(where)
    hypothesizer = Hypothesizer(folders[contract.hypothesizer], decode_precision, where)
    corrector = Corrector(folders[contract.corrector], decode_precision, where)
    for part, repository in ((hypothesizer, contract.hypothesizer), (corrector, contract.corrector)):
        if part.dim != identity.dim:
            raise InputError(
                f"{repository} inverts vectors of length {part.dim}, the encoder's have {identity.dim}; "
                "load a pair that belongs together"
            )

    # The decode loop re-encodes texts in the decoder's precision; `encode` may need a higher one (MIN_COSINE).
    loop_encoder = encoder
    if encoder.precision != decode_precision:
        network = cast(GtrEncoder, encoder.network)
        loop_encoder = TextEncoder(network, encoder.tokenizer, where, decode_precision)

    def embed(texts: Any) -> Any:
        encoded = loop_encoder.encode(texts)
        return encoded.vectors * encoded.norms[:, None]

    inverter = Inverter(
        Vec2TextHypothesizing(hypothesizer),
        corrector,
        embed,
        encoder.tokenizer.decode,
        lambda texts: encoder.tokenizer.encode(texts)[0],
        MAX_TOKENS - 1,  # vec2text's limit counts the start token
        where,
    )
    scale = 1.0 if contract.whole else float(np.mean(encoder.encode(SCALE_TEXTS).norms))
    digest = hashlib.sha256()
    for repository in (contract.hypothesizer, contract.corrector):
        for file in sorted(folders[repository].glob("*.safetensors")):
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return Codec(
        identity,
        encoder,
        inverter,
        scale,
        decoder_digest=digest.hexdigest(),
        find_writer=lambda: "no writer was requested" if find_writer is None else find_writer(identity),
    )
