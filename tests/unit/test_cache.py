"""A cache holds no more bytes than it may, whatever is put into it."""

import tracemalloc
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from lvm.cache import Cache, size_of


@dataclass(frozen=True)
class Answer:
    text: str
    vector: NDArray[np.float32]
    attempts: tuple[str, ...] = ()


def test_what_was_used_longest_ago_goes_first() -> None:
    one = Answer("x" * 1000, np.zeros(4, np.float32))
    cache: Cache[Answer] = Cache(2 * Cache(0).getsizeof(one))
    cache.put(b"a", one)
    cache.put(b"b", one)
    assert cache.find(b"a") is one
    cache.put(b"c", one)
    assert (cache.find(b"b"), cache.find(b"a"), len(cache)) == (None, one, 2)
    assert (cache.hits, cache.misses) == (2, 1)
    assert cache.hit_rate == pytest.approx(2 / 3)


def test_a_value_larger_than_the_cache_is_not_kept_and_costs_no_other() -> None:
    cache: Cache[str] = Cache(2000)
    cache.put(b"a", "short")
    cache.put(b"b", "x" * 3000)
    assert (cache.find(b"a"), cache.find(b"b")) == ("short", None)
    nothing: Cache[str] = Cache(0)
    nothing.put(b"a", "")
    assert len(nothing) == 0


def test_its_bytes_are_those_of_the_process() -> None:
    random = np.random.default_rng(0)
    most = 2**20
    cache: Cache[Answer] = Cache(most)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for i in range(800):
            text = chr(random.integers(32, 0x3000)) * int(random.integers(1, 2000))
            answer = Answer(text, random.random(768, np.float32), (text[:50], text[50:]))
            cache.put(i.to_bytes(16, "little"), answer)
        held = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert 0.8 * most < cache.currsize <= most
    assert 0.8 * most < held < 1.2 * most


def test_a_size_counts_all_that_is_held() -> None:
    text = "t" * 500
    whole = Answer(text, np.zeros(100, np.float32), (text, text))
    assert 3 * 500 + 400 < size_of(whole) < 3 * 500 + 400 + 1000
    assert size_of({"a": [whole]}) > size_of([whole]) > size_of(whole)
