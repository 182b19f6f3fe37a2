"""The environment the project gives its workers does what its comments say."""

import os
import platform
import subprocess
import sys

import pytest

from jobs._ray import WORKER_ENVIRONMENT

BATCHES_IN_A_THREAD = """
import resource, threading
import numpy as np

def work():
    for _ in range(40):
        parts = [np.ones(8 << 20, np.uint8) for _ in range(4)]
        del parts

before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(environment: dict[str, str]) -> int:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", BATCHES_IN_A_THREAD],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc reads these variables")
def test_batches_in_a_thread_do_not_give_their_memory_back_and_ask_for_it_again() -> None:
    assert page_faults(WORKER_ENVIRONMENT) * 5 < page_faults({})
