"""Taxonomies are refused, sequential text passes, whatever codec made the vectors."""

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from lvm.codec.zoo import load_codec, load_tokenizer
from lvm.corpus.chunker import Chunker
from lvm.corpus.coherence import (
    MAX_SHARED_STEPS,
    MIN_CONTINUITY,
    OVERRIDE,
    Coherence,
    find_episodes,
    measure_coherence,
    non_sequential_label,
    require_sequential,
)
from lvm.corpus.readers import read_articles
from lvm.errors import InputError

DATA = Path(os.environ.get("LATENT_DATA", Path(__file__).resolve().parents[4] / "shared" / "data"))
WORDNET = "ontology_wordnet"
SEQUENTIAL = ("wikipedia_1", "wikipedia_recent", "ood_stories", "ood_tutorials", "ood_science")

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]


def chunks_of(name: str, num_articles: int) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Texts, article numbers and positions of the first articles, 24 chunks of each at most."""
    source = "sample" if name == "sample" else str(DATA / f"{name}.jsonl.gz")
    if name != "sample" and not Path(source).exists():
        pytest.skip(f"needs {source}; set LATENT_DATA to the folder that holds {name}.jsonl.gz")
    articles = list(itertools.islice(read_articles(source), num_articles))
    chunks = [c[:24] for c in Chunker(load_tokenizer("mini")).chunk(articles)]
    docs = np.repeat(np.arange(len(chunks), dtype=np.int32), [len(c) for c in chunks])
    positions = np.array([c.position for cs in chunks for c in cs], np.int32)
    return [c.text for cs in chunks for c in cs], docs, positions


def tfidf_vectors(texts: Sequence[str]) -> np.ndarray:
    weights = TfidfVectorizer(sublinear_tf=True).fit_transform(texts)
    reduced = TruncatedSVD(min(128, weights.shape[1] - 1), random_state=0).fit_transform(weights)
    norms = np.linalg.norm(reduced, axis=1, keepdims=True)
    unit: np.ndarray = (reduced / np.maximum(norms, 1e-9)).astype(np.float32)
    return unit


def made_up(num_articles: int = 30, length: int = 12, drift: float = 0.6, seed: int = 0) -> Arrays:
    """Random walks on the sphere, a subject of its own for each article; drift 0 is noise."""
    random = np.random.default_rng(seed)
    subjects = random.normal(size=(num_articles, 1, 64))
    vectors = drift * subjects + random.normal(size=(num_articles, length, 64))
    flat = vectors.reshape(-1, 64)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    docs = np.repeat(np.arange(num_articles, dtype=np.int32), length)
    return flat.astype(np.float16), docs, np.tile(np.arange(length, dtype=np.int32), num_articles)


def measured(name: str, codec: str, num_articles: int = 30) -> Coherence:
    texts, docs, positions = chunks_of(name, num_articles)
    vectors = load_codec("mini").encode_chunks(texts).vectors if codec == "mini" else tfidf_vectors(texts)
    return measure_coherence(vectors, docs, positions)


@pytest.mark.parametrize("codec", ["tfidf", "mini"])
@pytest.mark.parametrize("num_articles", [15, 60])
def test_wordnet_chains_are_refused(codec: str, num_articles: int) -> None:
    found = measured(WORDNET, codec, num_articles)
    assert found.shared_steps > 2 * MAX_SHARED_STEPS
    assert found.fault is not None
    assert "taxonomy" in found.fault


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_articles_stories_tutorials_and_papers_pass(name: str) -> None:
    found = measured(name, "tfidf")
    assert found.fault is None
    assert found.shared_steps < MAX_SHARED_STEPS / 5
    assert found.continuity > 0.6


def test_mini_vectors_of_the_sample_pass_with_few_articles() -> None:
    found = measured("sample", "mini", 12)
    assert found.fault is None
    assert found.continuity > MIN_CONTINUITY + 0.03


def test_sample_whose_chunks_were_shuffled_over_articles_is_refused() -> None:
    texts, docs, positions = chunks_of("sample", 111)
    vectors = tfidf_vectors(texts)[np.random.default_rng(0).permutation(len(texts))]
    fault = measure_coherence(vectors, docs, positions).fault
    assert fault is not None
    assert "do not follow" in fault


def test_articles_with_a_subject_pass_and_noise_does_not() -> None:
    assert measure_coherence(*made_up()).fault is None
    noise = measure_coherence(*made_up(num_articles=100, drift=0.0))
    assert 0.48 < noise.continuity < MIN_CONTINUITY
    assert noise.fault is not None


def test_the_same_articles_twice_are_refused() -> None:
    vectors, docs, positions = made_up()
    twice = (np.concatenate([vectors, vectors]), np.concatenate([docs, docs + 30]), np.tile(positions, 2))
    found = measure_coherence(*twice)
    assert found.shared_steps == 1.0
    assert found.fault is not None


def test_one_shared_chunk_is_no_shared_step() -> None:
    vectors, docs, positions = made_up()
    vectors[positions == 5] = vectors[5]  # a phrase every article has once
    found = measure_coherence(vectors, docs, positions)
    assert found.shared_steps == 0.0


def test_steps_do_not_cross_articles_or_gaps() -> None:
    vectors, docs, positions = made_up(num_articles=4, length=6)
    positions[docs == 1] *= 2
    assert measure_coherence(vectors, docs, positions).num_steps == 3 * 5


@pytest.mark.parametrize("keep", [0, 1, 12, 30])
def test_too_little_to_judge_passes(keep: int) -> None:
    vectors, docs, positions = (a[:keep] for a in made_up(drift=0.0))
    assert measure_coherence(vectors, docs, positions).fault is None


def test_a_sample_of_a_large_corpus_is_bounded_and_repeatable() -> None:
    arrays = made_up(num_articles=600, length=40)
    first = measure_coherence(*arrays)
    assert first.num_articles == 128
    assert first.num_steps == 128 * 31
    assert measure_coherence(*arrays) == first
    assert measure_coherence(*arrays, seed=1) != first


@pytest.mark.parametrize(
    "name",
    [
        *(
            "ontology_wordnet.jsonl.gz",
            "WordNet",
            "wordnet_chains",
            "dbpedia-chains.jsonl",
            "ConceptNet 5",
            "swo",
        ),
        *("FactoidWiki", "factoid_wiki_large", "go.jsonl", "go-basic.obo", "GO chains", "gene_ontology"),
    ],
)
def test_names_of_taxonomies_are_refused(name: str) -> None:
    assert non_sequential_label(["enwiki", name]) == name
    vectors, docs, positions = made_up()
    with pytest.raises(InputError, match="its source is named"):
        require_sequential(vectors, docs, positions, [name])


@pytest.mark.parametrize(
    "name", ["enwiki", "go to town.jsonl", "wikipedia_1", "stories", "swordfish", "cargo", ""]
)
def test_other_names_are_taken(name: str) -> None:
    assert non_sequential_label([name]) is None


def test_refusal_says_what_was_found_and_how_to_override() -> None:
    noise: Any = made_up(num_articles=100, drift=0.0)
    with pytest.raises(InputError) as caught:
        require_sequential(*noise, names=["notes"])
    message = str(caught.value)
    assert "expected at least 52%" in message
    assert f'--allow-non-sequential "{OVERRIDE}"' in message
    assert "\n" not in message
    with pytest.raises(InputError, match="got 'yes'"):
        require_sequential(*noise, names=["notes"], override="yes")
    assert require_sequential(*noise, names=["wordnet"], override="I know this text is not sequential.").fault


def test_arrays_that_do_not_fit_are_refused() -> None:
    vectors, docs, positions = made_up()
    with pytest.raises(InputError, match="360 vectors, 359 article numbers"):
        measure_coherence(vectors, docs[1:], positions)


# ------------------------------------------------------------------------------------------------------ episodes


def about(*topics: int) -> np.ndarray:
    """(N, 8) unit vectors near the axes named, each a little different."""
    random = np.random.default_rng(0)
    vectors = np.eye(8, dtype=np.float32)[list(topics)] + random.normal(0, 0.05, (len(topics), 8))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_an_episode_ends_where_the_subject_changes_and_keeps_its_coherence() -> None:
    vectors = about(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2)
    episodes, coherence = find_episodes(vectors, np.arange(11))
    assert episodes.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    assert coherence.min() > 0.9
    expected = np.mean([vectors[i] @ vectors[i + 1] for i in (4, 5, 6)])
    assert coherence[4:8] == pytest.approx([expected] * 4, abs=1e-6)


def test_an_episode_holds_whole_paragraphs() -> None:
    vectors = about(
        0, 1, 0, 0, 1, 0, 2, 2, 2, 2
    )  # the second topic is inside paragraphs, the third begins at one
    episodes, _ = find_episodes(vectors, np.array([0, 0, 0, 1, 1, 1, 2, 2, 3, 3]))
    assert episodes.tolist() == [0] * 6 + [1] * 4


def test_one_subject_and_short_articles_are_one_episode() -> None:
    assert find_episodes(np.eye(8, dtype=np.float32)[[0] * 6], np.arange(6))[0].tolist() == [0] * 6
    assert find_episodes(about(0, 1), np.arange(2))[0].tolist() == [0, 0]
    episodes, coherence = find_episodes(about(0), np.arange(1))
    assert (episodes.tolist(), coherence.tolist()) == ([0], [1.0])
    assert len(find_episodes(about(), np.arange(0))[0]) == 0
    with pytest.raises(InputError, match="3 vectors and 2 paragraph numbers"):
        find_episodes(about(0, 1, 2), np.arange(2))
