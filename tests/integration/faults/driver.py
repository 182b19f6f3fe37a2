"""A job's driver in a process of its own, which a schedule may kill from outside or at its own n-th file step.

    python -m tests.integration.faults.driver STAGE FOLDER ADDRESS [STEP]

With STEP, the process kills itself (SIGKILL) when it opens for writing, renames, creates or removes for the STEP-th
time below FOLDER: a kill between any two steps of publishing, without luck. With STEP 0 it counts them and prints how
many there were.
"""

import functools
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from tests.doubles import FakeCodec

SECONDS_A_SHARD = 0.12
"""How long the codec takes over a shard, so that a fault finds some in flight."""

RECIPE_EPOCHS = 4
"""Epochs of a training run."""

WRITES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}


class SlowCodec(FakeCodec):
    """The arithmetic codec, slow enough to be hit, and noting each shard it begins: a byte in `log`."""

    def __init__(self, log: Path) -> None:
        super().__init__()
        self.log = log

    def encode_chunks(self, texts: Any) -> Any:
        if len(texts) > 1:
            with self.log.open("ab") as file:
                file.write(b".")
            time.sleep(SECONDS_A_SHARD)
        return super().encode_chunks(texts)


def slow_codec(log: Path) -> SlowCodec:
    """A codec loader for the job's workers."""
    return SlowCodec(log)


def kill_at_step(folder: Path, step: int) -> list[int]:
    """Watch this process's file steps below `folder`; the list that comes back holds their count."""
    count = [0]
    root = str(folder)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in WRITES and event != "open":
            return
        if event == "open" and not (isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")):
            return
        if not str(arguments[0]).startswith(root):
            return
        count[0] += 1
        if count[0] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    return count


def run_stage(stage: str, folder: Path) -> str:
    """Run a stage on the cluster this process is on; what it did, in a word."""
    if stage == "encode":
        from jobs.encode import encode_chunks

        load = functools.partial(slow_codec, folder / "log")
        done = encode_chunks(folder / "chunks", folder / "vectors", load)
        return f"encoded {len(done.encoded)}"
    if stage == "index":
        from jobs.index import build_with_ray
        from lvm.vectors.index import IndexSettings

        build_with_ray(folder / "vectors", folder / "index", IndexSettings(), None)
        return "built"
    if stage == "index here":
        from jobs.index import build
        from lvm.vectors.index import IndexSettings

        build(folder / "vectors", folder / "index", IndexSettings(), 1)
        return "built"
    if stage == "train":
        from dataclasses import replace

        from jobs.train import train_models
        from lvm.predict.training import FAST

        recipe = replace(FAST, epochs=RECIPE_EPOCHS, patience=None)
        result = train_models(folder / "vectors", folder / "models", ["amn"], recipe)
        if result.failed:
            raise RuntimeError(str(result.failed))
        return "trained"
    if stage == "evaluate":
        from jobs.evaluate import EvaluateSettings, Paths, evaluate
        from lvm.evaluate.baselines import RidgeSettings
        from tests.doubles import fake_codec

        paths = Paths(folder / "vectors", folder / "index", folder / "models", folder / "evaluation")
        settings = EvaluateSettings(
            examples=1,
            text_windows=6,
            pool_chunks=100,
            resamples=100,
            latency_budget_s=0.0,
            ridge=RidgeSettings(max_train_windows=60, max_val_windows=20, penalties=(1.0, 10.0)),
        )
        evaluate(paths, fake_codec, settings)
        return "evaluated"
    raise ValueError(stage)


def main() -> None:
    """As the module's docstring has it."""
    stage, folder, address = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    if stage == "index here":
        import faiss  # noqa: F401  # loaded before file steps count
    else:
        from jobs._ray import connect

        connect(address)
    count = kill_at_step(folder, int(sys.argv[4])) if len(sys.argv) > 4 else [0]
    done = run_stage(stage, folder)
    print(f"{done}; {count[0]} file steps", flush=True)


if __name__ == "__main__":
    # By its own name, so that workers import what they unpickle.
    from tests.integration.faults.driver import main as driver

    driver()
