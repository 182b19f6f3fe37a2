"""What a training run is, before any Ray: its fingerprint, its windows, and how many go at once."""

import dataclasses
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jobs._training import plan_resources, runs_at_once
from lvm.corpus.tmd import Prototypes
from lvm.errors import InputError
from lvm.predict.runs import TrainRun, windows_of
from lvm.predict.team import Team
from lvm.predict.training import FAST
from lvm.vectors.array import open_vectors
from lvm.vectors.sequences import WindowSettings, make_windows
from tests.doubles import FakeCodec, fake_articles, write_vectors


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "vectors"
    write_vectors(folder, fake_articles(40))
    return folder


@pytest.fixture
def run(vectors: Path) -> TrainRun:
    return TrainRun.of(open_vectors(vectors), "lstm", WindowSettings(context=2), FAST)


def prototypes() -> Prototypes:
    """TMD labels of the vectors' codec."""
    return Prototypes.of(lambda texts: FakeCodec().encode_chunks(texts).vectors)


def test_a_run_whose_model_reads_codes_has_a_name_of_its_own(run: TrainRun) -> None:
    coded = replace(run, prototypes=prototypes())
    assert (run.alias, coded.alias, coded.label) == ("lstm", "lstm-tmd", "lstm-tmd")
    assert coded.series not in (run.series, run.fingerprint)
    model = pickle.loads(pickle.dumps(coded)).build()
    assert np.array_equal(model.tmd.prototypes.numpy(), prototypes().vectors)


def test_another_architectures_rate_decides_nothing(run: TrainRun) -> None:
    rates = {**FAST.learning_rates, "gru": 0.1}
    assert replace(run, recipe=replace(FAST, learning_rates=rates)).fingerprint == run.fingerprint
    rates = {**FAST.learning_rates, "lstm": 0.1}
    assert replace(run, recipe=replace(FAST, learning_rates=rates)).fingerprint != run.fingerprint


def test_all_that_decides_the_weights_is_in_the_fingerprint(run: TrainRun) -> None:
    others = [
        replace(run, sizes={"hidden": 64}),
        replace(run, windows=WindowSettings(context=3)),
        replace(run, reach=3),
        replace(run, seed=1),
        replace(run, training_seed=1),
        replace(run, model="gpt2", layers_from=Path("somewhere")),
        replace(run, model="gpt2"),
        replace(run, prototypes=prototypes()),
    ]
    assert len({r.fingerprint for r in [run, *others]}) == len(others) + 1
    assert replace(run, sizes={"hidden": 512}).fingerprint == run.fingerprint  # the default


def test_runs_of_one_series_differ_in_the_trainings_seed_alone(run: TrainRun) -> None:
    second = replace(run, training_seed=1)
    assert run.series == run.fingerprint == second.series != second.fingerprint
    assert replace(run, seed=1).series != run.series
    assert (run.label, second.label) == ("lstm", "lstm seed 1")
    assert (replace(run, seed=5).seed_of_training, second.seed_of_training) == (5, 1)
    for own, other in zip(windows_of(run).values(), windows_of(second).values(), strict=True):
        assert np.array_equal(own.rows_of_target, other.rows_of_target)


def test_sizes_reach_the_model(run: TrainRun) -> None:
    assert replace(run, sizes={"hidden": 64}).build().config.hidden == 64


def test_with_a_reach_all_context_lengths_are_judged_on_the_same_targets(run: TrainRun) -> None:
    longer = make_windows(open_vectors(run.vectors), WindowSettings(context=4)).split(0)["val"]
    for context in (1, 2, 4):
        parts = windows_of(replace(run, windows=WindowSettings(context=context), reach=4))
        assert np.array_equal(parts["val"].rows_of_target, longer.rows_of_target)
        assert parts["val"].context == parts["train"].context == context
        contexts, targets = parts["val"].batch(slice(None))
        wanted, wanted_targets = longer.batch(slice(None))
        assert np.array_equal(contexts, wanted[:, -context:])
        assert np.array_equal(targets, wanted_targets)
    own = windows_of(run)["val"]
    assert len(own) > len(longer)
    assert not set(windows_of(run)["train"].doc_ids) & set(longer.doc_ids)


def test_more_of_a_context_than_there_is_is_refused(run: TrainRun) -> None:
    val = windows_of(run)["val"]
    for wrong in (0, 3):
        with pytest.raises(InputError, match=f"context is {wrong}; expected an integer of 1 to 2"):
            val.last(wrong)


def test_vectors_that_changed_are_refused(run: TrainRun) -> None:
    with pytest.raises(InputError, match="changed while this job ran"):
        windows_of(replace(run, vectors_fingerprint="0" * 16))


@pytest.mark.parametrize(
    ("nodes", "num_runs", "expected"),
    [
        ([{"CPU": 2.0}], 4, 4),
        ([{"CPU": 2.0}], 15, 4),
        ([{"CPU": 16.0}], 15, 15),
        ([{"CPU": 16.0, "GPU": 1.0}], 15, 8),
        ([{"CPU": 2.0, "GPU": 1.0}, {"CPU": 64.0}], 15, 4),
        ([{"CPU": 0.0}], 3, 1),
    ],
)
def test_as_many_runs_at_once_as_there_is_room_for(
    nodes: list[dict[str, float]], num_runs: int, expected: int
) -> None:
    at_once = runs_at_once(nodes, num_runs)
    assert at_once == expected
    resources, threads, _ = plan_resources(nodes, at_once)
    assert threads >= 1
    gpus = sum(n.get("GPU", 0.0) for n in nodes)
    assert resources.get("GPU", 0.0) * at_once <= max(gpus, 0.0) + 1e-9


def test_several_workers_a_run_leave_room_for_fewer_runs() -> None:
    assert runs_at_once([{"CPU": 2.0}], 4, workers=2) == 2
    assert runs_at_once([{"CPU": 2.0}], 4, workers=8) == 1
    assert runs_at_once([{"CPU": 16.0, "GPU": 1.0}], 15, workers=2) == 4


@pytest.mark.parametrize("windows", [1, 2, 3, 8])
def test_the_parts_of_a_team_weigh_as_the_whole_batch(windows: int) -> None:
    indices = np.arange(10, 10 + windows)
    values = np.linspace(1.0, 2.0, 99)
    parts = [Team(rank, 3).part(indices) for rank in range(3)]
    assert sorted(np.concatenate([mine for mine, weight in parts if weight])) == sorted(indices)
    assert np.mean([weight * values[mine].mean() for mine, weight in parts]) == pytest.approx(
        values[indices].mean()
    )


def test_a_plan_counts_what_is_free_and_all_where_nothing_is(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from jobs import _ray

    total = {"head": {"CPU": 0.0}, "gpu": {"CPU": 8.0, "GPU": 1.0, "memory": 32.0}}
    now = {"head": {}, "gpu": {"CPU": 7.0, "GPU": 1.0, "memory": 30.0}}
    monkeypatch.setattr(_ray, "FREE_S", 0.3)
    monkeypatch.setattr(ray._private.state, "available_resources_per_node", lambda: now)
    free = _ray._free_of(total)
    assert free == [{"CPU": 0.0}, {"CPU": 7.0, "GPU": 1.0, "memory": 32.0}]
    resources, _, _ = plan_resources(free, 4)
    assert resources == {"CPU": 1.0, "GPU": 0.25}
    # By the totals each of the four got two CPUs, and the fourth waited for the driver to end.
    assert plan_resources(list(total.values()), 4)[0]["CPU"] == 2.0
    now["gpu"] = {"CPU": 7.0}  # another job has the GPU: wait for it
    assert _ray._free_of(total) == list(total.values())
    later = iter([{"gpu": {"CPU": 1.0, "GPU": 1.0}}, {"gpu": {"CPU": 8.0, "GPU": 1.0}}])
    monkeypatch.setattr(ray._private.state, "available_resources_per_node", lambda: next(later))
    assert _ray._free_of(total)[1]["CPU"] == 8.0  # what has just ended is heard of a moment later


def test_a_run_is_pickled_whole(run: TrainRun) -> None:
    assert dataclasses.asdict(pickle.loads(pickle.dumps(run))) == dataclasses.asdict(run)
