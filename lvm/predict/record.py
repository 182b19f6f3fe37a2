"""Model records, one folder per trained model, and aliases that point to them.

    models/<name>-<UTC time>-<8 hex>/   model.safetensors, config.json, metrics.json, MODEL_CARD.md; rank.safetensors
    models/aliases.json                 {"lstm": "lstm-20250102T030405Z-1f3a9c2b"}

Folders appear atomically when complete and are never changed. Aliases are changed by replacing their file; earlier
records are kept.
"""

import fcntl
import hashlib
import json
import os
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn

from lvm.codec.identity import CodecIdentity
from lvm.errors import InputError
from lvm.models import MODELS, Predictor, build
from lvm.predict.ranking import RankHead
from lvm.predict.steer import CONTEXT_CHUNKS, PASSTHROUGH
from lvm.storage import Location, new_folder, plain_name, publish_folder
from lvm.vectors.shards import cannot_write, file_sha256, write_bytes, write_json

WEIGHTS, CONFIG, METRICS, CARD = "model.safetensors", "config.json", "metrics.json", "MODEL_CARD.md"
RANK_WEIGHTS = "rank.safetensors"
"""Weights of the rank head, if the record has one."""
ALIASES = "aliases.json"

KNOWN_ISSUES = (
    "Trained on squared distance, a predictor drifts towards the mean of what may follow: its vectors are "
    "blander than real ones, and decoded text shows it. Without a writer, snap them to the corpus before decoding.",
    "Predictions may be closer to the last context vector than to the true next one; see the margin in the evaluation.",
    "It works only with the codec named above; vectors of another codec are refused.",
)


@dataclass(frozen=True)
class Record:
    """A loaded model record."""

    name: str
    """Architecture: a key of MODELS, or ensemble."""
    folder: Location
    model: Predictor
    """With its weights, on the CPU, in evaluation mode."""
    config: dict[str, Any]
    """config.json: model, sizes, parameters, codec, and everything that determined the weights."""
    metrics: dict[str, Any]
    """metrics.json: val_cosine, learning curve and more."""
    identity: CodecIdentity
    ranker: RankHead | None = None
    """The rank head, on the CPU, in evaluation mode; None if the record has none."""

    @property
    def context(self) -> int:
        """Context length T of its training; CONTEXT_CHUNKS if the config has none."""
        windows = self.config.get("windows", {})
        found = windows.get("context", CONTEXT_CHUNKS) if isinstance(windows, dict) else windows
        if not isinstance(found, int) or found < 1:
            raise InputError(
                f"{self.folder / CONFIG} says context {found!r}, expected a whole number of 1 or more; the record was "
                "edited, train the model again"
            )
        return found


# ----------------------------------------------------------------------------------------------- save, load


def save_record(
    models: Location,
    name: str,
    model: Predictor,
    identity: CodecIdentity,
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    provenance: Mapping[str, str],
    issues: tuple[str, ...] = (),
    ranker: RankHead | None = None,
) -> Location:
    """Save a model as a new record; returns its folder. The alias is not changed.

    config, metrics: JSON-able; `model`, `sizes`, `parameters`, `codec` and the weights' hash are added to config.
    provenance: rows of the card's table ("Data source": "…"). issues: known issues of this particular model.
    Raises OutputError if the disk is full.
    """
    created = datetime.now(UTC)
    models.mkdir(parents=True, exist_ok=True)
    with new_folder(models / name) as temporary, _disk_errors(models):
        save_file(on_cpu(model.state_dict()), temporary / WEIGHTS)
        rank: dict[str, Any] = {}
        if ranker is not None:
            save_file(on_cpu(ranker.state_dict()), temporary / RANK_WEIGHTS)
            rank = {"sizes": ranker.sizes, "parameters": sum(p.numel() for p in ranker.parameters())}
            rank["weights_sha256"] = file_sha256(temporary / RANK_WEIGHTS)
        num_parameters = sum(p.numel() for p in model.parameters())
        full = {
            "model": name,
            "sizes": asdict(model.config),
            "parameters": num_parameters,
            "codec": identity.to_dict(),
            "created": created.isoformat(timespec="seconds"),
            "weights_sha256": file_sha256(temporary / WEIGHTS),
            **({"rank": rank} if rank else {}),
            **config,
        }
        write_json(temporary / CONFIG, full)
        write_json(temporary / METRICS, metrics)
        if rank:
            provenance = {**provenance, "Rank head": f"{rank['parameters']:,} parameters"}
        card = model_card(name, num_parameters, identity, created, metrics, provenance, issues)
        write_bytes(temporary / CARD, card.encode())
        digest = hashlib.sha256((temporary / WEIGHTS).read_bytes() + card.encode()).hexdigest()[:8]
        folder = models / f"{name}-{created:%Y%m%dT%H%M%SZ}-{digest}"
        with (temporary / WEIGHTS).open("rb") as file:
            os.fsync(file.fileno())
        publish_folder(temporary, folder, last=CONFIG)  # a record exists once it has a config
    return folder


def on_cpu(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in the form that safetensors can save."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}


@contextmanager
def _disk_errors(models: Location) -> Iterator[None]:
    """Raise errors of writing as OutputError."""
    try:
        yield
    except (OSError, SafetensorError) as err:
        raise cannot_write(models, err) from err


def load_record(models: Location, name_or_folder: str) -> Record:
    """Load the record with this alias or folder name.

    Raises InputError if there is none, listing the existing ones, or if one of its files is missing, damaged, or does
    not match the others.
    """
    folder = resolve(models, name_or_folder)
    config, metrics = read_json(folder / CONFIG), read_json(folder / METRICS)
    for key in ("model", "sizes", "codec"):
        if key not in config:
            raise InputError(f"{folder / CONFIG} has no {key!r}; it was edited or is of another version")
    try:
        identity = CodecIdentity.from_dict(config["codec"])
        model = build(config["model"], config["sizes"], tmd="tmd" in config)
        _load_weights(model, folder / WEIGHTS, config.get("weights_sha256"))
        ranker = None
        if (rank := config.get("rank")) is not None:
            ranker = RankHead(**rank["sizes"]).eval()
            _load_weights(ranker, folder / RANK_WEIGHTS, rank["weights_sha256"])
        record = Record(config["model"], folder, model.eval(), config, metrics, identity, ranker)
        _ = record.context  # raises InputError if it was edited
    except (TypeError, KeyError, AttributeError) as err:
        raise InputError(
            f"{folder / CONFIG} was edited or is damaged ({type(err).__name__}: {err}); train the model again"
        ) from err
    return record


def resolve(models: Location, name_or_folder: str) -> Location:
    """The record's folder for an alias or folder name. Raises InputError, listing the existing ones."""
    aliases = read_aliases(models)
    folder = models / aliases.get(name_or_folder, name_or_folder)
    if Path(name_or_folder).name == name_or_folder and (folder / CONFIG).is_file():
        return folder
    if name_or_folder in aliases:
        raise InputError(
            f"alias {name_or_folder!r} in {models / ALIASES} points to {aliases[name_or_folder]}, which does not "
            "exist; train that model again"
        )
    known = ", ".join([*aliases, *(p.name for p in record_folders(models))]) or "none yet"
    raise InputError(
        f"no model {name_or_folder!r} in {models}; there are: {known}. `latent train` makes one of "
        f"{', '.join(MODELS)}."
    )


def record_folders(models: Location) -> list[Location]:
    """Folders of all records, oldest first."""
    found = [p.parent for p in models.glob(f"*/{CONFIG}") if not p.parent.name.startswith(".")]
    return sorted(found, key=lambda p: (p.name.split("-")[-2:], p.name))


def find_record(models: Location, name: str, **wanted: Any) -> Location | None:
    """The newest intact record of this architecture whose config.json has these values, or None."""
    for folder in reversed(record_folders(models)):
        config = read_json(folder / CONFIG)
        complete = all((folder / file).is_file() for file in (WEIGHTS, METRICS))
        matches = config.get("model") == name and all(config.get(k) == v for k, v in wanted.items())
        if complete and matches and config.get("weights_sha256") in (None, file_sha256(folder / WEIGHTS)):
            return folder
    return None


def series_of(models: Location, record: Record) -> list[Location]:
    """Records that differ from this one only in their training seed, sorted by it; the newest of each seed."""
    series = record.config.get("series", record.config.get("run"))
    found: dict[int, Location] = {}
    for folder in record_folders(models) if series is not None else []:
        config = read_json(folder / CONFIG)
        if config.get("model") == record.name and config.get("series", config.get("run")) == series:
            found[config.get("training_seed", config["seed"])] = folder
    found[record.config.get("training_seed", record.config.get("seed", 0))] = record.folder
    return [found[seed] for seed in sorted(found)]


def read_aliases(models: Location) -> dict[str, str]:
    """Folder name of each alias; {} if nothing was trained yet."""
    path = models / ALIASES
    return {str(k): str(v) for k, v in read_json(path).items()} if path.exists() else {}


def default_alias(aliases: Iterable[str]) -> str:
    """The alias meant where no model is named: `best`, which `latent promote` sets, else gru, else the first."""
    known = list(aliases)
    return next((name for name in ("best", "gru", *known) if name in known), "gru")


def set_alias(models: Location, alias: str, folder: Location) -> None:
    """Point `alias` to this record, atomically; other processes on this machine wait. Raises InputError on a name that
    is no plain name, or means something else: another record, passthrough."""
    plain_name("an alias", alias)
    if alias == PASSTHROUGH or (alias != folder.name and (models / alias / CONFIG).is_file()):
        taken = "a predictor" if alias == PASSTHROUGH else "a record"
        raise InputError(f"{alias} is the name of {taken} already; choose another alias")
    if folder.parent.resolve() != models.resolve() or not (folder / CONFIG).is_file():
        raise InputError(f"expected a record in {models} for alias {alias!r}, got {folder}")
    with _alone(models):
        write_json(models / ALIASES, {**read_aliases(models), alias: folder.name})


@contextmanager
def _alone(models: Location) -> Iterator[None]:
    """Hold the folder's lock; object storage has none."""
    if not isinstance(models, Path):
        yield
        return
    lock = os.open(models, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _load_weights(model: nn.Module, source: Location, sha256: str | None) -> None:
    """Load a file's weights into the model. Raises InputError if the file is missing, damaged or does not fit.

    sha256: its expected hash; records of older versions have none.
    """
    try:
        data = source.read_bytes()  # one request on object storage
        digest = hashlib.sha256(data).hexdigest()
        if sha256 is not None and digest != sha256:
            raise InputError(
                f"{source} has SHA-256 {digest[:16]}…, its {CONFIG} says {sha256[:16]}…: it was damaged or replaced; "
                "train the model again"
            )
        weights = load(data)
    except (OSError, SafetensorError) as err:
        raise InputError(f"{source} cannot be read ({err}); train the model again") from err
    _fill(model, weights, source)


def _fill(model: nn.Module, weights: Mapping[str, Tensor], source: Location) -> None:
    expected = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    found = {k: tuple(v.shape) for k, v in weights.items()}
    if expected != found:
        differs = sorted(k for k in {*expected, *found} if expected.get(k) != found.get(k))
        raise InputError(
            f"{source} does not fit its architecture: {differs[0]} is {found.get(differs[0], 'missing')}, "
            f"expected {expected.get(differs[0], 'no such tensor')} ({len(differs)} tensors differ)"
        )
    if broken := [k for k, v in weights.items() if not torch.isfinite(v).all()]:
        raise InputError(f"{source}: {broken[0]} holds NaN or infinity ({len(broken)} such tensors)")
    model.load_state_dict(dict(weights))


def read_json(path: Location) -> dict[str, Any]:
    """The object in a JSON file of a record. Raises InputError if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise InputError(f"{path} cannot be read ({err}); expected JSON written by `latent train`") from err
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


# ------------------------------------------------------------------------------------------------------ card


def model_card(
    name: str,
    num_parameters: int,
    identity: CodecIdentity,
    created: datetime,
    metrics: Mapping[str, Any],
    provenance: Mapping[str, str],
    issues: tuple[str, ...] = (),
) -> str:
    """MODEL_CARD.md: architecture, origin, metrics and known issues."""
    numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    lines = [
        f"# {name}",
        "",
        "Predicts the next chunk's vector from the vectors of the chunks before it: "
        f"(B, T, {identity.dim}) in, (B, {identity.dim}) out, all of norm 1.",
        "",
        "| what | value |",
        "| --- | --- |",
        f"| Architecture | `{name}`, {num_parameters:,} parameters |",
        f"| Codec | {identity}, {identity.dim}-d, {identity.max_tokens} tokens, {identity.pooling} pooling |",
        *(f"| {what} | {_cell(value)} |" for what, value in provenance.items()),
        f"| Date | {created:%Y-%m-%d %H:%M} UTC |",
        "",
        "## Metrics",
        "",
        "| metric | value |",
        "| --- | --- |",
        *(f"| {k} | {v:,} |" if isinstance(v, int) else f"| {k} | {v:.4f} |" for k, v in numbers.items()),
        "",
        "## Known issues",
        "",
        *(f"- {issue}" for issue in (*issues, *KNOWN_ISSUES)),
        "",
    ]
    return "\n".join(lines)


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")


# ---------------------------------------------------------------------------------------------------- import


_NUMPY_SCALAR = np._core.multiarray.scalar  # type: ignore[attr-defined]
_NUMPY_NUMBERS: list[Any] = [
    # The types in a pickled numpy scalar, as which checkpoints store their scores. None of them can run code.
    (_NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
    (_NUMPY_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool")),
]

_BUFFERS = {"pos_encoder.pe"}
"""Tensors of the original that are not weights: positional encodings, which are computed here."""


def import_checkpoint(
    path: Path,
    models: Location,
    identity: CodecIdentity,
    config: Mapping[str, Any] | None = None,
    score: Callable[[Predictor], Mapping[str, Any]] | None = None,
) -> tuple[str, Location]:
    """Import a checkpoint {"model_state_dict": …} of the original system; returns architecture and new folder.

    The architecture is recognised by the tensors' names and shapes. identity: codec of the vectors that it was trained
    on, which the file does not state. config: more entries for config.json. score: computes metrics for the record.

    The file is loaded with `weights_only=True`, which refuses anything but tensors and plain values before code can
    run. Raises InputError then, and if the tensors match no architecture.
    """
    try:
        with torch.serialization.safe_globals(_NUMPY_NUMBERS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about other pickle protocols: they load, or raise
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as err:
        raise InputError(
            f"{path} holds Python objects besides tensors and plain values and was not loaded: such a file "
            "can run code. Where it was made, save only the weights: "
            'torch.save({"model_state_dict": model.state_dict()}, path).'
        ) from err
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as err:
        raise InputError(f"{path} is not a checkpoint that torch can read ({err})") from err
    state = content.get("model_state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        found = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise InputError(f'{path}: expected {{"model_state_dict": tensors}}, got {found or "nothing"}')
    # DistributedDataParallel and torch.compile prefix the names.
    plain = {k.removeprefix("module.").removeprefix("_orig_mod."): v.float() for k, v in state.items()}
    weights = {k: v for k, v in plain.items() if k not in _BUFFERS}
    name = _architecture_of(weights, path)
    model = build(name).eval()
    _fill(model, weights, path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    metrics = {
        f"original_{k}": float(v)
        for k, v in content.items()
        if isinstance(v, int | float | np.number) and not isinstance(v, bool)
    }
    folder = save_record(
        models,
        name,
        model,
        identity,
        {**(config or {}), "imported_from": path.name, "imported_sha256": sha256},
        {**metrics, **(score(model) if score is not None else {})},
        {"Imported from": f"{path.name}, SHA-256 {sha256}", "Training": "elsewhere; see its own notes"},
        ("Imported: its codec was stated by the user; the file does not contain it.",),
    )
    return name, folder


def _architecture_of(weights: Mapping[str, Tensor], path: Path) -> str:
    """The architecture with these tensor names. Raises InputError with the differences from the closest one."""
    names = set(weights)
    with torch.device("meta"):  # only names are needed
        expected = {name: set(build(name).state_dict()) for name in MODELS}
    for name, wanted in expected.items():
        if wanted == names:
            return name
    nearest = min(expected, key=lambda n: len(expected[n] ^ names))
    missing, extra = sorted(expected[nearest] - names), sorted(names - expected[nearest])
    raise InputError(
        f"{path} fits none of {', '.join(MODELS)}; nearest is {nearest}, for which {len(missing)} tensors are missing "
        f"({', '.join(missing[:3])}) and {len(extra)} unexpected ({', '.join(extra[:3])})"
    )
