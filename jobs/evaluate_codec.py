"""Measure a codec on held-out articles: `latent codec eval`. Reads articles, prints metrics, writes nothing.

    python -m jobs.evaluate_codec --input articles.jsonl.gz --limit 100 --json

Always: read-back of up to 2,000 chunks after 0, 1, 3 and 5 corrector steps (BLEU, token F1, exact share, round-trip
cosine); and retrieval of the article's next chunk among up to 10,000, compared with TF-IDF + SVD vectors of the same
dimension fitted on the same texts. Optional:

    --cosines        read-back of noised vectors at these cosines to the true ones
    --ridge-windows  how well a ridge regression on five vectors retrieves the sixth
    --run            read-back of the vectors that a run's predictors make from the input's contexts: BLEU and the other
                     metrics against the true next chunk (low by nature), and the cosine of the text to the predicted
                     vector, which depends on the codec only
    --beside         the same retrieval with a sentence-transformers model, and the rank correlation of the cosines

250 articles on two cores: about four minutes.
"""

import json
import time
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer

from jobs._ray import CodecName, CodecPath, Engine, PathOrUrl, articles_of, echo, load_codec_at, path_option
from jobs._ray import run as run_main
from lvm.codec.quality import (
    next_chunk_retrieval,
    rank_correlation,
    read_back,
    rotated,
    spread,
    tfidf_svd_vectors,
)
from lvm.codec.zoo import SENTENCE, Codec
from lvm.corpus.chunker import Chunker
from lvm.errors import InputError
from lvm.evaluate.predictability import contexts_of, ridge_retrieval, targets_of
from lvm.predict.predictor import load_predictor
from lvm.predict.record import read_aliases
from lvm.storage import Location

STEPS = (0, 1, 3, 5)
NUM_DECODED = 2_000
NUM_NOISED = 500
NUM_CANDIDATES = 10_000
FIGURES = ("bleu", "token_f1", "exact", "cosine")


def steps_of(codec: Codec) -> list[int]:
    """Those of STEPS that the codec supports."""
    return [s for s in STEPS if codec.supported_steps is None or s in codec.supported_steps]


def read_back_by_steps(
    codec: Codec, texts: list[str], vectors: Any, steps: list[int], norms: Any = None
) -> dict[str, dict[str, float]]:
    """Metric to step count (a string) to value, of `vectors` (N, D) decoded and compared with `texts`."""
    out: dict[str, dict[str, float]] = {name: {} for name in FIGURES}
    for number in steps:
        decoded = codec.decode(vectors, steps=number, norms=norms)
        figures = {**read_back(texts, decoded.texts), "cosine": float(decoded.cosines.mean())}
        for name in FIGURES:
            out[name][str(number)] = figures[name]
        echo(f"steps={number}: " + ", ".join(f"{n} {figures[n]:.4g}" for n in FIGURES))
    return out


def read_back_predictions(
    loaded: Codec,
    models: Location,
    texts: list[str],
    vectors: Any,
    doc_ids: npt.NDArray[np.int32],
    limit: int,
) -> dict[str, dict[str, Any]]:
    """Read-back of each model's predictions on at most `limit` contexts, by model name; `to_truth` is their mean cosine
    to the true next vector.

    Raises InputError when no article is long enough for a context and a next chunk, or `models` has no model.
    """
    names = sorted(read_aliases(models)) if models.is_dir() else []
    if not names:
        raise InputError(
            f"{models} has no model; expected the folder of `latent run` or `latent demo` for --run"
        )
    out: dict[str, dict[str, Any]] = {}
    for name in names:
        predictor = load_predictor(name, models)
        predictor.require_codec(loaded.identity, "the loaded codec")
        length = predictor.context
        targets = targets_of(doc_ids, length)
        if not len(targets):
            raise InputError(
                f"no article of the input has {length + 1} chunks; {predictor.name} needs a context of {length} and "
                "the next chunk"
            )
        targets = targets[spread(len(targets), limit)]
        made = predictor(vectors[contexts_of(targets, length)])
        echo(f"{len(made)} vectors predicted by {predictor.name}")
        out[name] = {
            "to_truth": float((made * vectors[targets]).sum(1).mean()),
            **read_back_by_steps(loaded, [texts[i] for i in targets], made, steps_of(loaded)[:3]),
        }
    return out


def parse_cosines(text: str | None) -> list[float]:
    """Numbers of a text like "1,0.9". Raises InputError on anything else, or outside 0 to 1."""
    try:
        cosines = [float(part) for part in text.split(",")] if text else []
    except ValueError as err:
        raise InputError(f"--cosines takes comma-separated numbers, such as 1,0.9,0.8; got {text!r}") from err
    if any(not 0 < c <= 1 for c in cosines):
        raise InputError(f"--cosines must be above 0 and at most 1, got {text!r}")
    return cosines


def main(
    input: Annotated[str, typer.Option(help="Articles the codec was not trained on; or sample.")],
    codec: CodecName = "mini",
    codec_path: CodecPath = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first N articles.")] = None,
    decoded: Annotated[int, typer.Option(min=1, help="Chunks to decode, evenly spread.")] = NUM_DECODED,
    cosines: Annotated[
        str | None,
        typer.Option(help="Also read back noised vectors at these cosines to the true ones: 1,0.9,0.8."),
    ] = None,
    ridge_windows: Annotated[
        int, typer.Option(min=0, help="Also fit a ridge regression on this many windows; 0 for none.")
    ] = 0,
    run: Annotated[PathOrUrl | None, path_option("Also decode the predictions of this run's models.")] = None,
    beside: Annotated[
        PathOrUrl | None, path_option("Folder of a sentence-transformers model to compare retrieval with.")
    ] = None,
    candidates: Annotated[int, typer.Option(min=10, help="Candidates for the next chunk.")] = NUM_CANDIDATES,
    engine: Engine = "lvm",
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON, not a table.")] = False,
) -> None:
    """Print a codec's metrics on held-out articles."""
    begun = time.perf_counter()
    distances = parse_cosines(cosines)
    loaded = load_codec_at(codec, codec_path, engine=engine)
    steps = steps_of(loaded)
    chunker = Chunker(loaded.tokenizer)
    texts: list[str] = []
    docs: list[int] = []
    for article in articles_of(input, limit):
        (chunks,) = chunker.chunk([article])
        docs += [docs[-1] + 1 if docs else 0] * len(chunks)
        texts += [c.text for c in chunks]
    if not texts:
        raise InputError(f"{input} has no chunks; expected articles with text")
    doc_ids = np.asarray(docs, np.int32)
    num_articles = int(doc_ids[-1]) + 1
    echo(f"{num_articles} articles, {len(texts)} chunks")
    encoded = loaded.encode_chunks(texts)
    vectors = encoded.vectors
    picked = spread(len(texts), decoded)
    sources = [texts[i] for i in picked]
    figures = read_back_by_steps(loaded, sources, vectors[picked], steps, encoded.norms[picked])
    summary: dict[str, Any] = {
        "codec": str(loaded.identity),
        "engine": engine,
        "articles": num_articles,
        "chunks": len(texts),
        "decoded": len(picked),
        "truncated": int(encoded.truncated.sum()),
        **figures,
    }
    if distances:
        few = spread(len(picked), NUM_NOISED)
        some = [sources[i] for i in few]
        summary["at_cosine"] = {}
        for distance in distances:
            echo(f"{len(few)} vectors at cosine {distance:g} to the true ones")
            off = rotated(vectors[picked[few]], distance)
            summary["at_cosine"][f"{distance:g}"] = read_back_by_steps(loaded, some, off, steps[:3])
    if run is not None:
        summary["predicted"] = read_back_predictions(
            loaded, run / "models", texts, vectors, doc_ids, min(NUM_NOISED, len(picked))
        )
    head = slice(0, candidates)
    dim = loaded.identity.dim
    baseline = next_chunk_retrieval(tfidf_svd_vectors(texts[head], dim), doc_ids[head])
    summary |= {
        "candidates": len(doc_ids[head]),
        **next_chunk_retrieval(vectors[head], doc_ids[head]),
        "tfidf_next_r1": baseline["next_r1"],
        "tfidf_next_r10": baseline["next_r10"],
    }
    if beside is not None:
        echo(f"encoding the same chunks with {beside}")
        other = load_codec_at(SENTENCE, beside).encode_chunks(texts[head]).vectors
        found = next_chunk_retrieval(other, doc_ids[head])
        summary |= {
            "beside_next_r1": found["next_r1"],
            "beside_next_r10": found["next_r10"],
            "beside_rank_correlation": rank_correlation(vectors[head], other, doc_ids[head]),
        }
    if ridge_windows:
        echo("ridge regression from five vectors to the sixth")
        summary["ridge"] = ridge_retrieval(vectors, doc_ids, ridge_windows, candidates)
        words = tfidf_svd_vectors(texts, dim)
        summary["tfidf_ridge"] = ridge_retrieval(words, doc_ids, ridge_windows, candidates)
    summary["seconds"] = round(time.perf_counter() - begun, 1)
    if as_json:
        print(json.dumps(summary))
        return
    for name, value in summary.items():
        if name in FIGURES:
            shown = "  ".join(f"{s} steps {v:.4f}" for s, v in value.items())
        else:
            shown = f"{value:.4f}" if isinstance(value, float) else str(value)
        print(f"{name:18} {shown}")


if __name__ == "__main__":
    run_main(main)
