"""How the encode job divides shards into tasks."""

import pytest

from jobs.encode import SHARDS_PER_TASK, TASKS_PER_SLOT, num_tasks


@pytest.mark.parametrize(("shards", "slots"), [(1, 1000), (5, 2), (247, 2), (2442, 2), (100, 192)])
def test_small_jobs_and_small_clusters_have_a_task_per_shard(shards: int, slots: int) -> None:
    assert num_tasks(shards, slots) == shards


@pytest.mark.parametrize(("shards", "slots"), [(480, 24), (24_415, 192), (24_415, 1000), (170_899, 1000)])
def test_on_large_clusters_tasks_hold_several_shards_and_are_still_many_for_each_slot(
    shards: int, slots: int
) -> None:
    tasks = num_tasks(shards, slots)
    assert shards / SHARDS_PER_TASK <= tasks <= shards / 2
    assert tasks >= slots * TASKS_PER_SLOT
