"""The quality gate of lower precision: what bfloat16 and int8 may lose against float32 on `mini`."""

import os
from pathlib import Path

import numpy as np
import pytest

from lvm.codec.quality import read_back
from lvm.codec.zoo import load_codec
from lvm.corpus.chunker import chunk_article
from lvm.corpus.readers import read_articles

CHECKOUT = Path(__file__).resolve().parents[3]
WIKIPEDIA = (
    Path(os.environ.get("LATENT_DATA", CHECKOUT.parent / "shared" / "data")) / "wikipedia_recent.jsonl.gz"
)
MOST_BLEU, MOST_COSINE = 0.3, 0.002


def loss(source: str, articles: int, number: int, precision: str) -> tuple[float, float]:
    """BLEU and cosine that the hypothesizer loses on `number` chunks of the source's first articles."""
    exact, rough = load_codec("mini", precision="float32"), load_codec("mini", precision=precision)
    chunks = [
        chunk.text
        for article in read_articles(source, limit=articles)
        for chunk in chunk_article(article, exact.tokenizer)
    ]
    texts = chunks[:: max(1, len(chunks) // number)][:number]
    assert len(texts) == number
    vectors = exact.encode_chunks(texts).vectors
    first, second = (codec.decode(vectors) for codec in (exact, rough))
    bleu = [read_back(texts, decoded.texts)["bleu"] for decoded in (first, second)]
    return bleu[0] - bleu[1], float(np.mean(first.cosines) - np.mean(second.cosines))


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_lower_precision_loses_next_to_nothing_on_the_sample(precision: str) -> None:
    bleu, cosine = loss("sample", 60, 400, precision)
    # 400 chunks: one text more or less that differs at its start moves BLEU by some tenths by chance alone.
    assert bleu < 3 * MOST_BLEU
    assert cosine < MOST_COSINE


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
@pytest.mark.skipif(not WIKIPEDIA.is_file(), reason=f"no {WIKIPEDIA.name}; set LATENT_DATA to its folder")
def test_lower_precision_holds_the_gate_on_unseen_wikipedia(precision: str) -> None:
    bleu, cosine = loss(str(WIKIPEDIA), 40, 1500, precision)
    assert bleu <= MOST_BLEU
    assert cosine <= MOST_COSINE
