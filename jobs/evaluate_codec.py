"""Measure a codec on held-out articles. Reads articles, prints figures, writes nothing.

    python -m jobs.evaluate_codec --input articles.jsonl.gz --limit 100 --json

Read-back of up to 2,000 chunks (BLEU, token F1, exact share, round-trip cosine) and, among up to 10,000 chunks,
how often the next chunk of the article is the nearest, beside TF-IDF + SVD vectors of the same length fitted on
the same texts. 100 articles on two cores: about a minute.
"""

import json
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from jobs._ray import run, say
from lvm.codec.quality import next_chunk_retrieval, read_back, tfidf_svd_vectors
from lvm.codec.zoo import load_codec
from lvm.corpus.chunker import chunk_article
from lvm.corpus.readers import read_articles

NUM_DECODED = 2_000
NUM_CANDIDATES = 10_000


def main(
    input: Annotated[str, typer.Option(help="Articles the codec was not trained on; or sample.")],
    codec: Annotated[str, typer.Option(help="Codec name.")] = "mini",
    codec_path: Annotated[Path | None, typer.Option(help="Folder of a codec of your own.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Articles to take, from the first.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON in place of a table.")] = False,
) -> None:
    """Print the figures."""
    begun = time.perf_counter()
    loaded = load_codec(codec, codec_path)
    texts: list[str] = []
    docs: list[int] = []
    num_articles = 0
    for number, article in enumerate(read_articles(input, limit)):
        chunks = chunk_article(article, loaded.tokenizer)
        texts += [c.text for c in chunks]
        docs += [number] * len(chunks)
        num_articles += 1
    say(f"{num_articles} articles, {len(texts)} chunks")
    encoded = loaded.encode(texts)
    picked = np.unique(np.linspace(0, len(texts) - 1, NUM_DECODED).astype(int))
    decoded = loaded.decode(encoded.vectors[picked])
    figures = read_back([texts[i] for i in picked], decoded.texts)
    doc_ids = np.asarray(docs[:NUM_CANDIDATES], np.int32)
    nearness = next_chunk_retrieval(encoded.vectors[:NUM_CANDIDATES], doc_ids)
    baseline = next_chunk_retrieval(tfidf_svd_vectors(texts[:NUM_CANDIDATES], loaded.identity.dim), doc_ids)
    summary = {
        "codec": str(loaded.identity),
        "articles": num_articles,
        "chunks": len(texts),
        "decoded": len(picked),
        "truncated": int(encoded.truncated.sum()),
        **{name: {"0": value} for name, value in figures.items()},
        "cosine": {"0": float(decoded.cosines.mean())},
        "candidates": len(doc_ids),
        **nearness,
        "tfidf_next_r1": baseline["next_r1"],
        "tfidf_next_r10": baseline["next_r10"],
        "seconds": round(time.perf_counter() - begun, 1),
    }
    if as_json:
        print(json.dumps(summary))
        return
    for name, value in summary.items():
        shown = value["0"] if isinstance(value, dict) else value
        print(f"{name:18} {shown:.4f}" if isinstance(shown, float) else f"{name:18} {shown}")


if __name__ == "__main__":
    run(main)
