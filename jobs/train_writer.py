"""Fit a writer for a codec's vectors with Ray Train: `latent train-writer`. Reads vector shards, writes a folder.

    python -m jobs.train_writer --vectors out/mine/vectors --output out/writer --minutes 60
    ray job submit --working-dir . -- python -m jobs.train_writer --vectors /shared/vectors --output /shared/writer

The folder is what --writer takes; it may also be placed in a codec's folder as `writer/`. The training loop is
`lvm.codec.writer_training.fit_writer`; it saves every few minutes, and the same command run again resumes, also
after a kill. Any codec's vectors will do: `mini`, a GTR pair, or a sentence-transformers model (`latent encode
--codec sentence-transformers --codec-path FOLDER`). Two cores process some 500 chunks per minute; after an hour the
writer's sentences are readable.
"""

import json
import time
from typing import Annotated, Any

import typer

from jobs._ray import Address, LanguageModel, PathOrUrl, connect, finish, path_option, run, worker_device
from jobs._training import output_on_disk, train_on_one_worker
from lvm.errors import InputError
from lvm.storage import local_folder
from lvm.vectors.sequences import MAX_SEED


def train_loop_per_worker(loop: dict[str, Any]) -> None:
    """The training on one worker; reports each held-out score."""
    from ray import train

    from lvm.codec.writer_training import fit_writer

    def here(folder: Any) -> Any:
        return None if folder is None else local_folder(folder)

    fit_writer(
        here(loop["vectors"]),
        here(loop["language_model"]),
        loop["output"],
        loop["settings"],
        str(worker_device()),
        loop["limit"],
        here(loop["init"]),
        on_score=train.report,
    )


def main(
    vectors: Annotated[PathOrUrl, path_option("Folder that `latent encode` wrote.")],
    output: Annotated[PathOrUrl, path_option("Folder of the writer, on a disk; resumes a run in it.")],
    minutes: Annotated[float, typer.Option(help="Total training time, resumed runs included.")] = 60.0,
    init: Annotated[PathOrUrl | None, path_option("Writer whose weights a new run starts from.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use only the first shards, up to N chunks.")
    ] = None,
    language_model: LanguageModel = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of weights, batches and noise.")] = 5,
    address: Address = None,
) -> None:
    """Fit a writer for the given time."""
    from lvm.codec.language_model import base_file, missing_base
    from lvm.codec.writer_training import WriterSettings

    settings = WriterSettings(minutes=minutes, seed=seed)
    if not (vectors / "manifest.json").exists():
        raise InputError(f"no manifest.json in {vectors}; expected the folder of a finished `latent encode`")
    if language_model is None and base_file() is None:  # fail here, not in a worker minutes later
        raise InputError(missing_base())
    output = output_on_disk(output)
    begun = time.perf_counter()
    connect(address)
    config = {
        "vectors": vectors.absolute(),
        "language_model": None if language_model is None else language_model.absolute(),
        "output": output,
        "settings": settings,
        "limit": limit,
        "init": None if init is None else init.absolute(),
    }
    train_on_one_worker(train_loop_per_worker, config, "writer", minutes, max_cpus=8)
    record = json.loads((output / "writer.json").read_text())
    finish(
        "train-writer",
        rows=record["chunks_seen"],
        score=record["held_out"],
        seconds=round(time.perf_counter() - begun, 1),
        paths={"writer": str(output)},
        codec=record["codec"],
    )


if __name__ == "__main__":
    run(main)
