"""Which run a service answers with: what a user_config may ask for, and what a replica keeps of it."""

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from lvm.errors import InputError
from serve.release import Held, Release, read_release
from serve.settings import ServeArgs
from tests.doubles import write_vectors


def release(word: str) -> Release:
    return Release("", word, ())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    write_vectors(folder / "vectors", [["one", "two"]])
    for part in ("index", "models"):
        (folder / part).mkdir()
    (folder / "models" / "aliases.json").write_text(json.dumps({"lstm": "lstm-1", "gru": "gru-1"}))
    return folder


def test_aliases_are_read_unless_models_are_named(run: Path) -> None:
    args = ServeArgs(run="/another")
    assert read_release({"run": str(run)}, args).models == (("lstm", "lstm-1"), ("gru", "gru-1"))
    named = read_release({"run": str(run), "models": {"gru": "gru-2"}, "release": "b"}, args)
    assert named == Release(str(run), "b", (("gru", "gru-2"),))
    assert "release 'b'" in str(named)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"run": "/not/there"}, "/not/there has no vectors/"),
        ({"run": "runs/wiki"}, "run runs/wiki is not an absolute path"),
        ({}, "change args.run"),
        ({"rnu": "/x"}, "user_config: rnu"),
        ({"run": 3}, "user_config: run.*got 3"),
        ({"run": "/x", "models": ["gru"]}, "user_config: models"),
    ],
)
def test_what_is_no_release_is_refused_in_words(wanted: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_release(wanted, ServeArgs(run="/a"))


def test_a_corpus_where_none_was_deployed_is_refused(run: Path) -> None:
    with pytest.raises(InputError, match="a running service cannot gain or lose its corpus"):
        read_release({"run": str(run)}, ServeArgs())


def test_two_releases_are_kept_and_each_is_loaded_once() -> None:
    loads: list[str] = []
    begun, go_on = threading.Event(), threading.Event()

    def load(asked: Release) -> str:
        loads.append(asked.name)
        if asked.name == "slow":
            begun.set()
            assert go_on.wait(30)
        if asked.name == "bad":
            raise InputError("no such run")
        return asked.name.upper()

    async def scenario() -> None:
        held = Held(load)
        assert [await held.get(release(w)) for w in "aba"] == ["A", "B", "A"]
        # What cannot be loaded takes nobody's place and is tried again.
        for _ in range(2):
            with pytest.raises(InputError, match="no such run"):
                await held.get(release("bad"))
        assert [await held.get(release(w)) for w in "ba"] == ["B", "A"]
        assert loads == ["a", "b", "bad", "bad"]
        # While one is loaded the others answer, and whoever asks for it meanwhile waits for the same.
        waiting = [asyncio.create_task(held.get(release("slow"))) for _ in range(2)]
        await asyncio.to_thread(begun.wait, 30)
        assert await held.get(release("a")) == "A"
        go_on.set()
        assert await asyncio.gather(*waiting) == ["SLOW", "SLOW"]
        assert loads[4:] == ["slow"]
        await held.get(release("b"))
        assert loads[4:] == ["slow", "b"]  # it was the one used longest ago

    asyncio.run(scenario())
