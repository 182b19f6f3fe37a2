"""What something that runs looks like from outside, looked at again and again in a thread."""

import threading
from typing import Self


class Sampler:
    """Calls `sample` when its block begins and then every `interval_s` until it ends."""

    interval_s: float

    def __init__(self) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def sample(self) -> None:
        """Look once; for subclasses."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        self.sample()
        while not self._over.wait(self.interval_s):
            self.sample()
