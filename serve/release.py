"""Which run the service answers with: the `user_config` of Gateway, Predictor and Retriever.

Ray Serve hands a changed `user_config` to the replicas that run (`reconfigure`); none restarts. Predictor and Retriever
load the new run beside the old one. A gateway takes it up when one of each has it, and tells them with every call which
run it means, so a request is answered by one run from its first stage to its last, whoever is ahead meanwhile.
"""

import asyncio
import json
from collections.abc import Callable, Mapping
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
    """Any word. Another one takes up what the aliases and the index of the same run are now."""
    models: dict[str, str] | None = None
    """Alias to record folder; by default what the run's aliases are when a replica takes this up."""


@dataclass(frozen=True)
class Release:
    """What is answered with."""

    run: str
    """Empty for the predictors that ship."""
    word: str
    models: tuple[tuple[str, str], ...]
    """Alias and record folder."""

    def __str__(self) -> str:
        return f"run {self.run or 'none'}, release {self.word!r}"


def read_release(wanted: Mapping[str, Any], args: ServeArgs) -> Release:
    """The release that a `user_config` asks for. Raises InputError where it is none, or its run is not whole."""
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
            f"user_config has run {asked.run!r}, args have {args.run!r}; with and without a corpus are two "
            "applications: change args.run"
        )
    if asked.run:
        folder = location(asked.run)
        if isinstance(folder, Path) and not folder.is_absolute():
            raise InputError(f"user_config: run {asked.run} is no absolute path; expected one of every node")
        require_run(asked.run)
    models = read_models(models_of(asked.run)) if asked.models is None else asked.models
    return Release(asked.run, asked.release, tuple(models.items()))


def read_models(models: Location) -> dict[str, str]:
    """Alias to record folder, as of now."""
    # As `lvm.predict.record.read_aliases`, which brings torch along; a builder has no use for it.
    path = models / "aliases.json"
    if not path.is_file():
        return {}
    try:
        return {str(k): str(v) for k, v in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError) as err:
        raise InputError(f"{path} cannot be read ({err}); expected JSON written by `latent train`") from err


class Held(Generic[Loaded]):
    """What a replica loaded of the two latest releases: requests of the one before may still be under way."""

    def __init__(self, load: Callable[[Release], Loaded]) -> None:
        self._load = load
        self._loads: dict[Release, asyncio.Future[Loaded]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="load")

    async def get(self, release: Release) -> Loaded:
        """Loaded in a thread of its own when first asked for. Raises what loading does; the next call tries again."""
        loading = self._loads.pop(release, None)
        if loading is None:
            loading = asyncio.get_running_loop().run_in_executor(self._thread, self._load, release)
        self._loads[release] = loading  # the latest asked for comes last
        try:
            loaded = await asyncio.shield(loading)
        except Exception:
            if self._loads.get(release) is loading:
                del self._loads[release]
            raise
        while len(self._loads) > 2:  # only now: what cannot be loaded takes no place
            del self._loads[next(iter(self._loads))]
        return loaded
