"""The backfill of half a million chunks in small: the real jobs from articles to an index, as its bench runs them."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import CHECKOUT

pytestmark = pytest.mark.slow

NUM_CHUNKS = 20_000
MOST_BYTES = 6 << 30
"""Peak memory of all processes that the full backfill is held to, too."""


def write_articles(path: Path) -> None:
    """The bundled articles again and again, each time with one word in five replaced by another of theirs.

    No two chunks are the same then, and the nearest vectors are no ties.
    """
    draw = random.Random(0)
    records = [
        json.loads(line)
        for file in sorted((CHECKOUT / "data" / "sample").glob("*.jsonl"))
        for line in file.read_text().splitlines()
    ]
    words = [word for record in records for word in record["text"].split()]
    # Chunks are of some twelve words.
    copies = 1 + NUM_CHUNKS * 14 // len(words)
    with path.open("w") as out:
        for copy in range(copies):
            for record in records:
                text = " ".join(
                    w if draw.random() < 0.8 else draw.choice(words) for w in record["text"].split()
                )
                out.write(
                    json.dumps({"id": f"{record['id']}-{copy}", "title": record["title"], "text": text})
                    + "\n"
                )


@pytest.fixture(scope="module")
def backfill(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the bench measured: chunk, encode and index, each a process of its own with its own Ray."""
    folder = tmp_path_factory.mktemp("backfill")
    write_articles(folder / "articles.jsonl")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.bench.encode_backfill", "--input", str(folder / "articles.jsonl")),
            *("--output", str(folder / "out")),
        ],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def test_every_id_comes_out_once_with_the_vector_of_its_text(backfill: dict[str, Any]) -> None:
    assert backfill["chunk"]["rows"] >= NUM_CHUNKS
    for stage in ("encode", "index"):
        assert backfill[stage]["rows"] == backfill["chunk"]["rows"]
    assert backfill["check"]["ids_equal"]
    assert backfill["check"]["ids_unique"]
    assert backfill["check"]["cosines_of"] >= 1_000
    assert backfill["check"]["cosine_to_float32_min"] >= 0.9995


def test_memory_is_bounded_and_nothing_is_spilled(backfill: dict[str, Any]) -> None:
    for stage in ("chunk", "encode", "index"):
        # Ray alone is some hundred megabytes: less would say that nobody was looked at.
        assert 200 << 20 < backfill[stage]["peak_pss_bytes"] <= MOST_BYTES, stage
        assert backfill[stage]["spilled_bytes"] == 0, stage
    # A vector of 768 float16 numbers is 1,536 bytes before Parquet packs it; the array that readers map has it again,
    # with 165 bytes of id and numbers.
    assert 1_300 + 1_701 < backfill["encode"]["bytes_written"] / backfill["encode"]["rows"] < 1_700 + 1_701


def test_the_index_finds_what_an_exact_search_finds(backfill: dict[str, Any]) -> None:
    index = backfill["index"]
    assert index["settings"]["type"] == "IVF_FLAT"
    assert (index["settings"]["nlist"], index["settings"]["probes"]) == (128, 16)
    assert index["recall"]["recall_queries"] == 256
    # An eighth of the lists is looked into; made-up neighbours are spread wider than real ones.
    assert index["recall"]["recall_stored"] >= 0.75
    assert index["recall"]["recall_blended"] >= 0.75
