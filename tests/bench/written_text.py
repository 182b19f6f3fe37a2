"""Do predictions read, are they on the topic, and do they say more than the corpus mean? Of `latent generate`'s rows.

    latent generate --input HIDDEN.jsonl.gz --run RUN --model gru --limit 300 --output predictions.jsonl
    python -m tests.bench.written_text --predictions predictions.jsonl --nats

What limits the figures: the language model judges with the weights the writer started from, so fluency is cheap for it;
keywords and cosines are what the vector brought. Real next texts are judged beside, in the same run. With --nats also
what a token of the true next text costs given its predicted vector, against the corpus mean in its place. The last line
is JSON.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from lvm.codec.ladder import keywords
from lvm.codec.zoo import Codec, load_codec
from lvm.evaluate.texts import distinct_2
from lvm.predict.predictor import SHIPPED, load_predictor


def centred_cosines(codec: Codec, first: list[str], second: list[str], centre: np.ndarray) -> np.ndarray:
    """(N,) cosines of the texts' vectors about the corpus mean."""
    a, b = (codec.encode_chunks([t or " " for t in texts]).vectors - centre for texts in (first, second))
    return np.asarray((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1))


def nats(codec: Codec, rows: list[dict[str, Any]], model: str, models: Path) -> dict[str, float]:
    """Nats a token of the true next texts given their predicted vectors, and given the corpus mean."""
    import torch

    from lvm.codec.language_model import load_base
    from lvm.codec.writer import Writer
    from lvm.codec.writer_training import Tokens, token_nats

    writer = codec.writer
    assert writer is not None
    base = load_base()
    parts = Writer.parts(writer.folder, base, codec.identity)
    predict = load_predictor(model, models)
    flat = codec.encode_chunks([t for r in rows for t in r["context"]]).vectors
    made = torch.from_numpy(predict(flat.reshape(len(rows), -1, flat.shape[1])))
    tokens = Tokens([r["next"] for r in rows], base.model, base.end_id)
    places = torch.full((base.model.config.vocab_size,), -1)
    places[parts.prefix.kept] = torch.arange(len(parts.prefix.kept))
    mean = torch.nn.functional.normalize(torch.from_numpy(writer.centre), dim=0)
    out: dict[str, float] = {}
    for name, given in (("predicted", made), ("mean", mean.expand(len(rows), -1))):
        found = []
        with torch.inference_mode():
            for low in range(0, len(rows), 32):
                ids, mask = tokens.batch(np.arange(low, min(low + 32, len(rows))))
                found.append(
                    token_nats(
                        base.model, parts.adapter, parts.prefix, given[low : low + 32], ids, mask, places
                    )
                )
        out[name] = float(torch.cat(found).mean())
    return out


def main() -> None:
    """Print the table, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--predictions", type=Path, required=True)
    parser.add_argument("--models", type=Path, default=SHIPPED, help="models that predicted")
    parser.add_argument("--model", default="gru")
    parser.add_argument("--nats", action="store_true")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.predictions.open()]
    rows = [r for r in rows if r["next"]]
    codec = load_codec("mini", device="cpu")
    writer = codec.writer
    assert writer is not None, codec.no_writer
    centre = writer.centre
    texts = {"written": [r["text"] for r in rows], "real next": [r["next"] for r in rows]}
    if rows[0]["extract"] is not None:
        texts["found"] = [r["extract"] for r in rows]
    table: dict[str, dict[str, float]] = {}
    for name, some in texts.items():
        logs = writer.log_probs(some)
        known = [" ".join([*r["context"], r["next"] if name != "real next" else ""]) for r in rows]
        table[name] = {
            "gibberish": float((logs < writer.least_log_prob).mean()),
            "log_prob": float(logs.mean()),
            "keyword": float(
                np.mean([bool(keywords(k) & keywords(t)) for k, t in zip(known, some, strict=True)])
            ),
            "distinct_2": distinct_2(some),
            "to_next": float(centred_cosines(codec, some, texts["real next"], centre).mean()),
            "most_common": max(some.count(t) for t in set(some)) / len(some),
        }
        print(f"{name:10}", "  ".join(f"{k} {v:.3f}" for k, v in table[name].items()), flush=True)
    summary: dict[str, Any] = {
        "rows": len(rows),
        "sources": {s: sum(r["source"] == s for r in rows) for s in ("exact", "writer", "corpus")},
        "to_prediction": float(np.mean([r["cosine"] for r in rows])),
        **table,
        "distinct_2_ratio": table["written"]["distinct_2"] / table["real next"]["distinct_2"],
    }
    if args.nats:
        summary["nats"] = nats(codec, rows, args.model, args.models)
        print("nats a token", summary["nats"])
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
