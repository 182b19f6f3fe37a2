"""A trained predictor as a function on numpy arrays: contexts in, next vectors out.

Letters: B contexts, T context vectors, D vector length.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lvm.arguments import floats
from lvm.codec.identity import CodecIdentity, require_same_codec
from lvm.devices import usable_device
from lvm.errors import InputError
from lvm.predict.record import ALIASES, CONFIG, Record, load_record, read_aliases
from lvm.predict.steer import CONTEXT_CHUNKS, PASSTHROUGH
from lvm.storage import Location, location

SHIPPED = Path(__file__).parent / "weights"
"""Model records bundled with the package, for the bundled codec."""

BATCH_CONTEXTS = 1024
"""Contexts per forward pass; a transformer's activations then take about 100 MB."""


@dataclass(frozen=True, eq=False)
class TrainedPredictor:
    """A model record, or `passthrough`, which predicts the last vector again."""

    record: Record | None
    """The record; None for passthrough."""

    @property
    def name(self) -> str:
        """Folder name of the record, or "passthrough"."""
        return PASSTHROUGH if self.record is None else self.record.folder.name

    @property
    def context(self) -> int:
        """Context length T that it was trained with; it accepts others."""
        return CONTEXT_CHUNKS if self.record is None else self.record.context

    def require_codec(self, identity: CodecIdentity, what: str) -> None:
        """Raise IdentityError unless it predicts vectors of this codec; passthrough accepts any."""
        if self.record is not None:
            require_same_codec(self.record.identity, identity, f"model {self.name}", what)

    def __call__(self, contexts: NDArray[Any]) -> NDArray[np.float32]:
        """Unit vectors (B, D) float32 from contexts (B, T, D), oldest first, with any T of 1 or more.

        Raises InputError on a wrong shape or D.
        """
        given = self._checked(contexts)
        if self.record is None:
            return given[:, -1]
        return self._in_batches(self.record.model.eval(), given)

    def search(self, contexts: NDArray[Any]) -> NDArray[np.float32]:
        """Query vectors (B, D) float32, norm 1, to search the next chunk with: from the rank head if the record has
        one, else the predictions. Arguments and errors as in `__call__`."""
        if self.record is None or self.record.ranker is None:
            return self(contexts)
        from lvm.predict.ranking import features_of

        model, head = self.record.model.eval(), self.record.ranker
        given = self._checked(contexts)
        return self._in_batches(lambda part: head(part, features_of(model, part)), given)

    def _checked(self, contexts: NDArray[Any]) -> NDArray[np.float32]:
        dim = None if self.record is None else self.record.identity.dim
        given = floats("contexts", contexts, f"numbers (B, T, {dim or 'D'})")
        if given.ndim != 3 or given.shape[1] < 1 or given.shape[2] != (dim or given.shape[2]):
            raise InputError(
                f"contexts have shape {given.shape}, expected (B, T, {dim or 'D'}) for model {self.name}: "
                "a list of contexts, each of one vector or more"
            )
        bad = np.flatnonzero(~(np.abs(given).max(axis=(1, 2), initial=0.0) < 1e6))
        if bad.size:
            raise InputError(
                f"context {bad[0]} holds NaN, infinity or huge numbers ({bad.size} do); expected unit vectors"
            )
        return given

    def _in_batches(self, network: Callable[[Any], Any], given: NDArray[np.float32]) -> NDArray[np.float32]:
        import torch

        assert self.record is not None
        device = next(self.record.model.parameters()).device
        made = np.empty((len(given), given.shape[2]), np.float32)
        with torch.inference_mode():
            for low in range(0, len(given), BATCH_CONTEXTS):
                part = torch.from_numpy(given[low : low + BATCH_CONTEXTS]).to(device)
                made[low : low + len(part)] = network(part).float().cpu().numpy()
        return made


def load_predictor(
    model: Location | str = "gru", models: Location | str | None = None, device: str = "cpu"
) -> TrainedPredictor:
    """Load a predictor by name or path, to a torch device or "auto".

    model: `passthrough`; an alias or folder name among the records in `models`; without `models`, a bundled model
    (`gru`, `amn`), or a record's path, whose last part may be an alias (`out/mine/models/lstm`). Raises InputError if
    there is none, or one of its files is missing or damaged.
    """
    name = str(model)
    if name == PASSTHROUGH:
        return TrainedPredictor(None)
    if models is not None:
        return _load(location(models), name, device)
    shipped = read_aliases(SHIPPED)
    if name in shipped:
        return _load(SHIPPED, name, device)
    folder = location(model).resolve()
    if not (folder / CONFIG).is_file() and not (folder.parent / ALIASES).is_file():
        raise InputError(
            f"no model {name!r}; expected a bundled one ({', '.join(shipped)}), passthrough, or the folder of a record "
            "that `latent train` or `lvm.fit` wrote; for an alias of a run give its folder too (--run DIR)"
        )
    return _load(folder.parent, folder.name, device)


def _load(models: Location, name: str, device: str) -> TrainedPredictor:
    record = load_record(models, name)
    target = usable_device(device)
    record.model.to(target)
    if record.ranker is not None:
        record.ranker.to(target)
    return TrainedPredictor(record)
