"""How should a vector's energy be divided between topic and words? Read-back against retrieval and predictability.

    python -m tests.bench.codec_tradeoff --input held_out.jsonl.gz --limit 700 --output tests/bench/results

`mini` scales its topic part to a fixed share of the energy before the whole is normalised, so the same weights give
the codec at any share: topic and words are encoded once and mixed anew. What limits each figure: retrieval and
regression see words as noise on the topic; the decoder sees noise of a fixed cosine the more, the less energy words
have. Without noise the share does not matter, for the scale is undone before decoding. The hypothesizer was trained at
one share only, so its own reading at others is a lower bound; the corrector step has no weights to be trained.

Prints a table and, last, one line of JSON; writes codec_tradeoff.png.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lvm.codec.quality import next_chunk_retrieval, read_back, rotated, tfidf_svd_vectors
from lvm.codec.zoo import Codec, load_codec
from lvm.corpus.chunker import Chunker
from lvm.corpus.readers import read_articles
from lvm.evaluate.predictability import ridge_retrieval

SHARES = (0.15, 0.3, 0.45, 0.6, 0.75, 0.9)
NOISE_COSINE = 0.9


def mixed(vectors: Any, topic_dim: int, own_share: float, share: float) -> Any:
    """Unit vectors (N, D) of a codec with `own_share` of energy in the topic, as one with `share` would give them."""
    ratio = np.sqrt(share / (1 - share) * (1 - own_share) / own_share)
    out = vectors.copy()
    out[:, :topic_dim] *= ratio
    return out / np.linalg.norm(out, axis=1, keepdims=True)


def one_step(codec: Codec, vectors: Any) -> list[str]:
    """Texts after one corrector step, without a look at their vectors, which would be of the shipped share."""
    inverter = codec.inverter
    found = inverter.correct(vectors, vectors, inverter.hypothesize(vectors))
    return codec.tokenizer.decode([c.ids for c in found])


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Read-back against retrieval and predictability.")
    parser.add_argument("--input", required=True, help="articles the codec was not trained on")
    parser.add_argument("--limit", type=int, default=700, help="articles to take")
    parser.add_argument("--decoded", type=int, default=200, help="chunks to read back at each share")
    parser.add_argument("--ridge-windows", type=int, default=20_000)
    parser.add_argument("--candidates", type=int, default=10_000)
    parser.add_argument("--baseline", action="store_true", help="TF-IDF + SVD too; as long as the rest")
    parser.add_argument("--output", type=Path, required=True, help="folder for the plot")
    args = parser.parse_args(arguments)
    begun = time.perf_counter()
    codec = load_codec("mini", device="cpu")
    network = codec.inverter.hypothesizer.network  # type: ignore[attr-defined]
    config = network.config
    chunker = Chunker(codec.tokenizer)
    texts: list[str] = []
    docs: list[int] = []
    for number, article in enumerate(read_articles(args.input, args.limit)):
        chunks = chunker.chunk([article])[0]
        texts += [c.text for c in chunks]
        docs += [number] * len(chunks)
    doc_ids = np.asarray(docs, np.int32)
    vectors = codec.encode_chunks(texts).vectors
    picked = np.unique(np.linspace(0, len(texts) - 1, args.decoded).astype(int))
    sources = [texts[i] for i in picked]
    head = slice(0, args.candidates)
    rows: list[dict[str, float]] = []
    lexical_energy = config.full_tokens * (config.word_weight**2 + config.order_weight**2)
    for share in SHARES:
        divided = mixed(vectors, config.topic_dim, config.topic_share, share)
        # The words' scale is read off the topic part, whose norm before normalising depends on the share.
        network.topic_norm = float(np.sqrt(lexical_energy * share / (1 - share)))
        clean = divided[picked]
        written = [one_step(codec, v) for v in (clean, rotated(clean, NOISE_COSINE))]
        rows.append(
            {
                "topic_share": share,
                "clean_f1": read_back(sources, written[0])["token_f1"],
                "noisy_f1": read_back(sources, written[1])["token_f1"],
                "next_r10": next_chunk_retrieval(divided[head], doc_ids[head])["next_r10"],
                "ridge_r10": ridge_retrieval(divided, doc_ids, args.ridge_windows, args.candidates)["r10"],
            }
        )
        print("  ".join(f"{k} {v:.4f}" for k, v in rows[-1].items()), flush=True)
    baseline: dict[str, float] = {}
    if args.baseline:
        words = tfidf_svd_vectors(texts, config.dim)
        baseline = {
            "next_r10": next_chunk_retrieval(words[head], doc_ids[head])["next_r10"],
            "ridge_r10": ridge_retrieval(words, doc_ids, args.ridge_windows, args.candidates)["r10"],
        }
    plot(rows, baseline, config.topic_share, args.output / "codec_tradeoff.png")
    summary = {
        "codec": str(codec.identity),
        "chunks": len(texts),
        "shares": rows,
        "tfidf": baseline,
        "seconds": round(time.perf_counter() - begun, 1),
    }
    print(json.dumps(summary))


def plot(rows: list[dict[str, float]], baseline: dict[str, float], shipped: float, path: Path) -> None:
    """Two panels over the share: read-back, and the two retrievals with TF-IDF + SVD as dashed lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shares = [r["topic_share"] for r in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    left.plot(shares, [r["clean_f1"] for r in rows], "o-", label="of the vector itself")
    left.plot(shares, [r["noisy_f1"] for r in rows], "s-", label=f"at cosine {NOISE_COSINE:g} from it")
    left.set(
        xlabel="share of energy in the topic part", ylabel="token F1, one corrector step", ylim=(0, 1.03)
    )
    for key, mark, label in (
        ("next_r10", "o-", "nearest neighbour"),
        ("ridge_r10", "s-", "ridge, five to the sixth"),
    ):
        (line,) = right.plot(shares, [r[key] for r in rows], mark, label=label)
        if key in baseline:
            right.axhline(baseline[key], ls="--", color=line.get_color(), lw=1)
    right.set(xlabel="share of energy in the topic part", ylabel="next chunk among 10,000, R@10")
    right.set_ylim(0)
    for axes in (left, right):
        axes.axvline(shipped, color="0.7", lw=1, zorder=0)
        axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
