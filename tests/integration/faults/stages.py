"""One schedule against one stage: break it, run it again, and compare with an undisturbed run."""

import hashlib
import json
import shutil
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jobs.train import RESTARTS
from lvm.errors import LvmError
from lvm.vectors.array import open_vectors
from lvm.vectors.index import Index, build_index, load_index
from lvm.vectors.shards import Manifest, read_table, table_to_vectors
from tests.doubles import fake_articles, write_chunks, write_vectors
from tests.integration.faults.driver import RECIPE_EPOCHS, run_stage
from tests.integration.faults.schedules import Schedule
from tests.integration.faults.world import World, small_disk, start_driver, wait_for

NUM_SHARDS, ARTICLES_A_SHARD = 10, 3
IN_FLIGHT = 4
"""Shards that two actors hold at once (`jobs.encode.SHARDS_PER_ACTOR`, and the next one each)."""


class Broken(AssertionError):
    """What the harness promises did not hold."""


@dataclass(frozen=True)
class Outcome:
    """What one schedule did."""

    what: str
    """How the disturbed run ended, in a few words."""
    redone: int
    """Units of work done more than once: shards, epochs, builds."""


def require(holds: bool, message: str) -> None:
    """Raise Broken unless `holds`."""
    if not holds:
        raise Broken(message)


class Attempt:
    """A stage running in a thread of this process, which is then the job's driver."""

    def __init__(self, stage: str, folder: Path) -> None:
        self.ended = "finished"
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, args=(stage, folder), daemon=True)
        self.thread.start()

    def _run(self, stage: str, folder: Path) -> None:
        try:
            run_stage(stage, folder)
        except LvmError as err:
            self.ended, self.error = f"refused: {str(err).replace(f'{folder}/', '')[:60]}", err
        except BaseException as err:
            # Ray's own exceptions: a whole trace in their text.
            self.ended, self.error = f"failed: {type(err).__name__}", err

    def alive(self) -> bool:
        """True while it runs."""
        return self.thread.is_alive()

    def wait(self) -> str:
        """How it ended. Raises Broken when it hangs."""
        self.thread.join(120)
        require(not self.alive(), "the job hung for two minutes")
        return self.ended

    def wait_for_refusal(self, word: str) -> str:
        """How it ended: refused by an error that holds `word`. Raises Broken otherwise."""
        ended = self.wait()
        require(
            ended.startswith("refused") and word in str(self.error),
            f"it should be refused for {word!r}, it {ended}: {str(self.error)[:300]}",
        )
        return ended


def again(stage: str, folder: Path) -> None:
    """Run a stage undisturbed in this process; it must succeed."""
    attempt = Attempt(stage, folder)
    ended = attempt.wait()
    require(ended == "finished", f"the second run ended: {ended} ({attempt.error})")


def flip(path: Path, pick: int) -> None:
    """Turn one bit of a file."""
    data = bytearray(path.read_bytes())
    data[pick % len(data)] ^= 1 << pick % 8
    path.write_bytes(data)


def epochs_trained(run: Path) -> list[int]:
    """Every epoch a run's curves have a training loss of, one that was trained twice twice."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found = []
    for path in (run / "tensorboard").glob("events.*"):
        for event in EventFileLoader(str(path)).Load():
            found += [event.step for value in event.summary.value if value.tag == "train_loss"]
    return sorted(found)


def shards_of(folder: Path) -> dict[str, str]:
    """File name to hash of the ids and vectors of the finished shards in a folder."""
    found = {}
    for path in sorted(folder.glob("part-*.parquet")):
        table = read_table(path)
        digest = hashlib.sha256("".join(table.column("chunk_id").to_pylist()).encode())
        digest.update(table_to_vectors(table).tobytes())
        found[path.name] = digest.hexdigest()
    return found


class Stages:
    """What all schedules share: the cluster, and inputs with the results of undisturbed runs.

    What an earlier run of the harness left in `scratch` is taken as it is, as far as it got.
    """

    def __init__(self, world: World, scratch: Path, stages: tuple[str, ...]) -> None:
        self.world, self.scratch = world, scratch
        self.world.connect()
        base = scratch / "base"
        articles = fake_articles(NUM_SHARDS * ARTICLES_A_SHARD, 6)
        if "encode" in stages:
            write_chunks(base / "encode" / "chunks", articles, ARTICLES_A_SHARD)
            again("encode", base / "encode")
            self.vectors = shards_of(base / "encode" / "vectors")
            (base / "encode" / "log").unlink(missing_ok=True)
        if "index" in stages:
            for left in (base / "index", scratch / "count"):
                shutil.rmtree(left, ignore_errors=True)
            write_vectors(base / "index" / "vectors", fake_articles(20, 6, seed=1))
            build_index(open_vectors(base / "index" / "vectors"), base / "index" / "index")
            self.old_version = load_index(base / "index" / "index").directory.name
            shutil.rmtree(base / "index" / "vectors")
            write_vectors(base / "index" / "vectors", fake_articles(30, 6, seed=2))
            shutil.copytree(base / "index", scratch / "count")
            counted = start_driver("index here", scratch / "count", world.address, 0)
            self.index_steps = int(counted.communicate()[0].split("; ")[1].split()[0])
            made = load_index(scratch / "count" / "index")
            self.new_version, self.new_sha256 = made.directory.name, made.manifest.shards[0].sha256
            require(self.new_version != self.old_version, "the two indexes should differ")
        if "train" in stages or "evaluate" in stages:
            write_vectors(base / "train" / "vectors", fake_articles(24, 12))
            shutil.copytree(base / "train", scratch / "trained", dirs_exist_ok=True)
            again("train", scratch / "trained")
            self.metrics = self._metrics(scratch / "trained")
            build_index(open_vectors(scratch / "trained" / "vectors"), scratch / "trained" / "index")
        if "evaluate" in stages:
            shutil.copytree(scratch / "trained", scratch / "evaluated", dirs_exist_ok=True)
            again("evaluate", scratch / "evaluated")
            self.scores = self._scores(scratch / "evaluated")
        self.base = base

    def run(self, schedule: Schedule) -> Outcome:
        """Do one schedule in a folder of its own."""
        folder = self.scratch / f"schedule-{schedule.number:04d}"
        source = self.scratch / "trained" if schedule.stage == "evaluate" else self.base / schedule.stage
        # The reference's vectors are what this run has to make.
        leave = shutil.ignore_patterns("vectors") if schedule.stage == "encode" else None
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder, ignore=leave)
        try:
            outcome: Outcome = getattr(self, f"_{schedule.stage}")(schedule, folder)
        finally:
            self.world.mend()
            left = self.world.free_leftovers()
        if left:
            outcome = replace(outcome, what=f"{outcome.what}; Ray kept {left} placement group")
        shutil.rmtree(folder)
        return outcome

    # ---- encode

    def _encode(self, schedule: Schedule, folder: Path) -> Outcome:
        target = folder / "vectors"
        begun = int(schedule.moment * (NUM_SHARDS - 1))
        source = sorted((folder / "chunks").glob("part-*.parquet"))[schedule.pick % NUM_SHARDS]
        intact = source.read_bytes()

        def reached() -> bool:
            return len(list(target.glob("part-*.parquet"))) >= begun

        damaged, most_in_hand = 0, IN_FLIGHT
        if schedule.fault == "disk full":
            share = sum(p.stat().st_size for p in (self.base / "encode" / "vectors").glob("part-*.parquet"))
            with small_disk(target, max(16 << 10, int(share * schedule.moment))) as grow:
                attempt = Attempt("encode", folder)
                ended = attempt.wait_for_refusal("space")
                require(not list(target.glob(".*.tmp")), "temporary files are left on the full disk")
                # Actors may try every shard there is before the driver has heard of the first refusal; what was written
                # must not be tried again.
                most_in_hand = NUM_SHARDS - len(list(target.glob("part-*.parquet")))
                grow()
                again("encode", folder)
        elif schedule.fault.startswith("kill driver"):
            step = 1 + int(schedule.moment * 4) if "step" in schedule.fault else None
            process = start_driver("encode", folder, self.world.address, step)
            if step is None:
                wait_for(lambda: (begun > 0 and reached()) or target.exists(), lambda: process.poll() is None)
                wait_for(reached, lambda: process.poll() is None)
                process.kill()
            process.communicate()
            ended = f"driver exit {process.returncode}"
            self._let_go("ShardEncoder")
        else:
            if schedule.fault == "corrupt input":
                flip(source, schedule.pick)
            attempt = Attempt("encode", folder)
            wait_for(reached, attempt.alive)
            if schedule.fault == "kill actor":
                self.world.kill_worker("ShardEncoder", schedule.pick)
            elif schedule.fault == "kill raylet":
                self.world.kill_raylet(schedule.pick)
            ended = attempt.wait()
            if schedule.fault == "corrupt input":
                require(source.name in str(attempt.error), f"the damaged input is not named: {attempt.error}")
                require(
                    len(shards_of(target)) == NUM_SHARDS - 1,
                    "a damaged input kept others from being finished",
                )
                source.write_bytes(intact)
            elif schedule.fault in ("corrupt shard", "partial shard"):
                shard = sorted(target.glob("part-*.parquet"))[schedule.pick % NUM_SHARDS]
                damaged = 1
                if schedule.fault == "corrupt shard":
                    flip(shard, schedule.pick)
                else:
                    whole = shard.read_bytes()
                    shard.write_bytes(whole[: int(len(whole) * schedule.moment)])
                    (target / f".{shard.name}.0123456789ab.tmp").write_bytes(whole[:100])
                if schedule.moment < 0.5:
                    (target / "manifest.json").unlink()
        again("encode", folder)
        self._check_vectors(folder)
        redone = len((folder / "log").read_bytes()) - NUM_SHARDS
        most = damaged + most_in_hand
        require(redone <= most, f"{redone} shards were encoded twice, expected at most {most}")
        return Outcome(ended, redone)

    def _let_go(self, name: str) -> None:
        """Wait until a killed driver's actors are gone; their work would count as the next run's."""
        end = time.monotonic() + 30
        while self.world.workers(name) and time.monotonic() < end:
            time.sleep(0.05)

    def _check_vectors(self, folder: Path) -> None:
        chunks, target = Manifest.load(folder / "chunks", "chunks"), folder / "vectors"
        manifest = Manifest.load(target, "vectors")
        manifest.verify(target, deep=True)
        came, went = [], []
        for shard in chunks.shards:
            went += read_table(folder / "chunks" / shard.file, ["chunk_id"]).column("chunk_id").to_pylist()
            came += read_table(target / shard.file, ["chunk_id"]).column("chunk_id").to_pylist()
        require(came == went and len(set(came)) == len(came), "ids out are not ids in")
        require(shards_of(target) == self.vectors, "checksums differ from an undisturbed run's")
        left = [p.name for p in target.iterdir() if p.name.startswith(".")]
        require(not left, f"left behind: {left}")

    # ---- index

    def _index(self, schedule: Schedule, folder: Path) -> Outcome:
        index = folder / "index"
        ended = ""
        if schedule.fault == "kill at a file step":
            step = 1 + schedule.pick % self.index_steps
            process = start_driver("index here", folder, self.world.address, step)
            process.communicate()
            ended = f"killed at step {step} of {self.index_steps}: exit {process.returncode}"
            require(process.returncode == -9, f"step {step} was not reached: {process.returncode}")
        elif schedule.fault == "kill worker":
            attempt = Attempt("index", folder)
            time.sleep(schedule.moment * 0.8)
            self.world.kill_worker("build", schedule.pick, wait_s=0.3)
            ended = attempt.wait()
        elif schedule.fault == "kill raylet":
            attempt = Attempt("index", folder)
            time.sleep(schedule.moment * 0.8)
            self.world.kill_raylet(schedule.pick)
            ended = attempt.wait()
        elif schedule.fault == "corrupt input":
            shard = folder / "vectors" / "part-00001.parquet"
            intact = shard.read_bytes()
            flip(shard, schedule.pick)
            attempt = Attempt("index", folder)
            ended = attempt.wait()
            # A bit between the pages is in no vector: then it may as well be built.
            require(
                shard.name in str(attempt.error) or attempt.error is None,
                f"the damaged input is not named: {attempt.error}",
            )
            shard.write_bytes(intact)
        elif schedule.fault == "kill driver":
            process = start_driver("index", folder, self.world.address)
            wait_for(lambda: bool(self.world.workers("build")), lambda: process.poll() is None)
            time.sleep(schedule.moment * 0.5)
            process.kill()
            process.communicate()
            ended = f"driver exit {process.returncode}"
        elif schedule.fault == "disk full":
            used = sum(p.stat().st_size for p in index.rglob("*") if p.is_file())
            with_room = folder / "with room"
            index.rename(with_room)
            with small_disk(index, used + (64 << 10) + int(schedule.moment * used)) as grow:
                shutil.copytree(with_room, index, dirs_exist_ok=True)
                attempt = Attempt("index", folder)
                ended = attempt.wait_for_refusal("cannot be written")
                self._require_whole(index)
                grow()
                again("index", folder)
                self._require_whole(index, self.new_version)
        else:
            again("index", folder)
            version = load_index(index).directory
            flip(version / "index.faiss", schedule.pick)
            ended = "a bit of the published version turned"
        if schedule.fault != "corrupt version":
            self._require_whole(index)
        again("index", folder)
        self._require_whole(index, self.new_version)
        left = [str(p.relative_to(index)) for p in index.rglob(".*")]
        require(not left, f"left behind: {left}")
        return Outcome(ended, 0)

    def _require_whole(self, folder: Path, name: str | None = None) -> Index:
        """The published index, which must be the old or the new one (or `name`), whole, and answer."""
        index = load_index(folder)
        found = index.directory.name
        require(found in ({name} if name else {self.old_version, self.new_version}), f"published {found}")
        index.manifest.verify(index.directory, deep=True)
        made_anew = found == self.new_version and index.manifest.shards[0].sha256 != self.new_sha256
        require(not made_anew, "the new index differs from an undisturbed run's")
        vectors = index.reconstruct([0, len(index) - 1])
        require(index.search(vectors, 1)[1][:, 0].tolist() == [0, len(index) - 1], f"{found} answers wrongly")
        return index

    # ---- train

    def _train(self, schedule: Schedule, folder: Path) -> Outcome:
        runs = folder / "models" / "runs"
        epochs = 1 + int(schedule.moment * 2)
        # The epoch in flight, and the one before, whose checkpoint Ray Train may not have listed yet: its controller
        # looks every POLL_S, which is longer than such epochs.
        most_redone = 2

        def reached() -> bool:
            return len(list(runs.glob("*/checkpoint_2*"))) >= epochs

        if schedule.fault in ("kill driver", "corrupt checkpoint"):
            process = start_driver("train", folder, self.world.address)
            wait_for(reached, lambda: process.poll() is None)
            process.kill()
            process.communicate()
            ended = f"driver exit {process.returncode}"
            self._let_go("RayTrainWorker")
            if schedule.fault == "corrupt checkpoint":
                latest = max(runs.glob("*/checkpoint_2*"))
                damaged = latest / ("model.safetensors", "optimiser.pt")[schedule.pick % 2]
                if schedule.moment < 0.5:
                    damaged.write_bytes(damaged.read_bytes()[: int(damaged.stat().st_size * schedule.moment)])
                else:
                    flip(damaged, schedule.pick // 2)
                ended += f", then {damaged.name} damaged"
                most_redone = RECIPE_EPOCHS  # it may begin anew
        elif schedule.fault == "disk full":
            models = folder / "models"
            with small_disk(models, int((4 + 60 * schedule.moment) * (1 << 20))) as grow:
                attempt = Attempt("train", folder)
                ended = attempt.wait()
                require(
                    ended.startswith(("refused", "failed")) and "space" in str(attempt.error),
                    f"a full disk should be said, it {ended}: {str(attempt.error)[:300]}",
                )
                grow()
                again("train", folder)
            # Each of the attempts Ray Train makes at a run may lose as much.
            most_redone *= 1 + RESTARTS
        else:
            attempt = Attempt("train", folder)
            wait_for(reached, attempt.alive)
            if schedule.fault == "kill worker":
                self.world.kill_worker("RayTrainWorker", schedule.pick)
            elif schedule.fault == "kill raylet":
                self.world.kill_raylet(schedule.pick)
            ended = attempt.wait()
            if schedule.fault == "partial checkpoint list":
                shutil.rmtree(next(p for p in (folder / "models").iterdir() if p.name.startswith("amn-")))
                (folder / "models" / "aliases.json").unlink()
                snapshot = next(runs.glob("*/*checkpoint_manager*"))
                snapshot.write_bytes(snapshot.read_bytes()[: int(snapshot.stat().st_size * schedule.moment)])
                ended += ", then its list of checkpoints cut off"
                most_redone = 0  # what there was is set aside whole, with its curves
        again("train", folder)
        metrics = self._metrics(folder)
        off = abs(metrics["val_cosine"] - self.metrics["val_cosine"])
        require(off < 1e-3, f"val cosine is {off:.5f} off an undisturbed run's")
        curve = [row["epoch"] for row in metrics["curve"]]
        require(curve == list(range(RECIPE_EPOCHS + 1)), f"epochs of the curve: {curve}")
        trained = epochs_trained(next(p for p in runs.iterdir() if ".broken-" not in p.name))
        require(set(trained) == set(range(1, RECIPE_EPOCHS + 1)), f"epochs trained: {trained}")
        redone = len(trained) - RECIPE_EPOCHS
        require(redone <= most_redone, f"{redone} epochs were trained twice, expected at most {most_redone}")
        return Outcome(ended, redone)

    @staticmethod
    def _metrics(folder: Path) -> dict[str, Any]:
        alias = json.loads((folder / "models" / "aliases.json").read_text())["amn"]
        metrics: dict[str, Any] = json.loads((folder / "models" / alias / "metrics.json").read_text())
        return metrics

    # ---- evaluate

    def _evaluate(self, schedule: Schedule, folder: Path) -> Outcome:
        output = folder / "evaluation"
        if schedule.fault == "corrupt report":
            again("evaluate", folder)
            report = output / "evaluation.json"
            report.write_bytes(report.read_bytes()[: int(report.stat().st_size * schedule.moment)])
            attempt = Attempt("evaluate", folder)
            ended = attempt.wait_for_refusal(str(report))
            report.unlink()
        elif schedule.fault == "corrupt model":
            (weights,) = (folder / "models").glob("amn-*/model.safetensors")
            intact = weights.read_bytes()
            flip(weights, schedule.pick)
            attempt = Attempt("evaluate", folder)
            ended = attempt.wait_for_refusal(str(weights))
            weights.write_bytes(intact)
        elif schedule.fault == "disk full":
            whole = sum(p.stat().st_size for p in (self.scratch / "evaluated" / "evaluation").iterdir())
            with small_disk(output, max(4 << 10, int(whole * schedule.moment))) as grow:
                attempt = Attempt("evaluate", folder)
                ended = attempt.wait_for_refusal("space")
                grow()
                again("evaluate", folder)
        elif schedule.fault in ("kill worker", "kill raylet"):
            attempt = Attempt("evaluate", folder)
            wait_for(lambda: bool(self.world.workers("score_")), attempt.alive)
            time.sleep(schedule.moment)
            if schedule.fault == "kill worker":
                self.world.kill_worker("score_", schedule.pick, wait_s=0.3)
            else:
                self.world.kill_raylet(schedule.pick)
            ended = attempt.wait()
        else:
            step = 1 + int(schedule.moment * 12) if "step" in schedule.fault else None
            process = start_driver("evaluate", folder, self.world.address, step)
            if step is None:
                time.sleep(2 + 4 * schedule.moment)
                process.kill()
            process.communicate()
            ended = f"driver exit {process.returncode}"
        if (output / "evaluation.json").exists():
            self._scores(folder)  # whole, or not there
        again("evaluate", folder)
        require(self._scores(folder) == self.scores, "scores differ from an undisturbed run's")
        left = [p.name for p in output.iterdir() if p.name.startswith(".")]
        require(not left, f"left behind: {left}")
        return Outcome(ended, 0)

    @staticmethod
    def _scores(folder: Path) -> dict[str, float]:
        record = json.loads((folder / "evaluation" / "evaluation.json").read_text())
        return {e["name"]: round(e["cosine"]["mean"], 6) for e in record["entries"]}
