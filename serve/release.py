"""The release that the service answers with: the `user_config` of Gateway, Predictor and Retriever.

Ray Serve passes a changed `user_config` to the running replicas (`reconfigure`) without restarting them. Predictor and
Retriever load the new run beside the old one. A gateway switches once a replica of each has loaded it, and names its
release in every call, so that all stages of a request use the same run during a rollout.
"""

import asyncio
import json
import logging
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from lvm.errors import InputError
from lvm.storage import Location, location
from serve.settings import ServeArgs, Strict, models_of, require_run

Loaded = TypeVar("Loaded")


class ReleaseArgs(Strict):
    """A `user_config`."""

    run: str = ""
    """Folder of a run, as `ServeArgs.run`, of the same codec."""
    release: str = ""
    """Any string. A new one reloads the aliases and the index of the same run."""
    models: dict[str, str] | None = None
    """Alias to record folder; by default the run's aliases at the time a replica loads the release."""


@dataclass(frozen=True)
class Release:
    """A run and its models."""

    run: str
    """Empty for the bundled predictors."""
    name: str
    models: tuple[tuple[str, str], ...]
    """Alias and record folder."""

    def __str__(self) -> str:
        return f"run {self.run or 'none'}, release {self.name!r}"


def read_release(wanted: Mapping[str, Any], args: ServeArgs) -> Release:
    """The release that a `user_config` names. Raises InputError if it is invalid or its run is incomplete."""
    try:
        asked = ReleaseArgs.model_validate(wanted)
    except ValidationError as err:
        first = err.errors()[0]
        raise InputError(
            f"user_config: {'.'.join(map(str, first['loc']))}: {first['msg']}, got {first['input']!r}; expected run, "
            "release and models (serve/release.py)"
        ) from err
    if bool(asked.run) != bool(args.run):
        raise InputError(
            f"user_config has run {asked.run!r}, args have {args.run!r}; a running service cannot gain or lose its "
            "corpus: change args.run"
        )
    if asked.run:
        folder = location(asked.run)
        if isinstance(folder, Path) and not folder.is_absolute():
            raise InputError(
                f"user_config: run {asked.run} is not an absolute path; expected one that every node has"
            )
        require_run(asked.run)
    models = read_models(models_of(asked.run)) if asked.models is None else asked.models
    return Release(asked.run, asked.release, tuple(models.items()))


def read_models(models: Location) -> dict[str, str]:
    """The current aliases: alias to record folder."""
    # Not `lvm.predict.record.read_aliases`, which imports torch: building an application does not need it.
    path = models / "aliases.json"
    if not path.is_file():
        return {}
    try:
        return {str(k): str(v) for k, v in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError) as err:
        raise InputError(f"{path} cannot be read ({err}); expected JSON written by `latent train`") from err


class Held(Generic[Loaded]):
    """The two latest releases, or what else names them, loaded in a replica: requests for the previous one may still
    be in flight."""

    def __init__(self, load: Callable[[Any], Loaded]) -> None:
        self._load = load
        self._loads: dict[Hashable, asyncio.Future[Loaded]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="load")

    async def prepare(self, wanted: Mapping[str, Any], args: ServeArgs) -> None:
        """Load the release of a `user_config` before a gateway switches to it. Errors are only logged: the gateway
        meets them too, and rejects the release."""
        try:
            await self.get(read_release(wanted, args))
        except Exception as err:  # not raised, as Ray would stop the replica
            logging.getLogger("ray.serve").warning("release not loaded: %s", err)

    async def get(self, release: Hashable) -> Loaded:
        """The loaded release. The first call loads it, in a separate thread; after an error the next call retries."""
        loading = self._loads.pop(release, None)
        if loading is None:
            loading = asyncio.get_running_loop().run_in_executor(self._thread, self._load, release)
        self._loads[release] = loading  # most recently used last
        try:
            loaded = await asyncio.shield(loading)
        except Exception:
            if self._loads.get(release) is loading:
                del self._loads[release]
            raise
        while len(self._loads) > 2:  # only after success: a failed load evicts nothing
            del self._loads[next(iter(self._loads))]
        return loaded
