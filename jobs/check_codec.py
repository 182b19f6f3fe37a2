"""Check that a codec reads texts back: `latent codec check`. Prints a table, writes nothing.

    python -m jobs.check_codec
    python -m jobs.check_codec --codec gtr-jxe --codec-path /models "A text." "Another."

A round trip (encode, decode, compare) of the given texts, of --input, or of the bundled sample. If the mean cosine is
as low as that of a mismatched encoder and decoder, it warns and ends with exit code 1.
"""

import json
import time
from typing import Annotated, Any

import typer

from jobs._ray import CodecName, CodecPath, Engine, echo, load_codec_at, run
from lvm.codec.quality import MISMATCHED_COSINE, read_back, spread
from lvm.corpus.chunker import Chunker
from lvm.corpus.readers import read_articles
from lvm.errors import InputError


def main(
    texts: Annotated[list[str] | None, typer.Argument(help="Texts to check; default: --input.")] = None,
    input: Annotated[str, typer.Option(help="Articles to chunk if no texts are given.")] = "sample",
    num_chunks: Annotated[int, typer.Option(min=1, help="Chunks of --input, evenly spread.")] = 64,
    codec: CodecName = "mini",
    codec_path: CodecPath = None,
    steps: Annotated[int | None, typer.Option(min=0, help="Corrector steps; default: 1 if possible.")] = None,
    engine: Engine = "lvm",
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON, not a table.")] = False,
) -> None:
    """Encode and decode texts, and compare the result."""
    begun = time.perf_counter()
    loaded = load_codec_at(codec, codec_path, engine=engine)
    able = loaded.supported_steps
    number = steps if steps is not None else (1 if able is None or 1 in able else 0)
    if able is not None and number not in able:
        raise InputError(
            f"codec {loaded.identity} supports {', '.join(map(str, able))} steps, got {number}; choose one of these"
        )
    if not texts:
        chunker = Chunker(loaded.tokenizer)
        chunks = [c.text for a in read_articles(input, None) for c in chunker.chunk([a])[0]]
        if not chunks:
            raise InputError(f"{input} has no chunks; expected articles with text")
        texts = [chunks[i] for i in spread(len(chunks), num_chunks)]
    encoded = loaded.encode_chunks(texts)
    decoded = loaded.decode(encoded.vectors, steps=number, norms=encoded.norms)
    mean = float(decoded.cosines.mean())
    mismatched = mean < MISMATCHED_COSINE
    summary: dict[str, Any] = {
        "codec": str(loaded.identity),
        "engine": engine,
        "texts": len(texts),
        "steps": number,
        **read_back(texts, decoded.texts),
        "cosine": mean,
        "truncated": int(encoded.truncated.sum()),
        "norm_mean": float(encoded.norms.mean()),
        "norm_std": float(encoded.norms.std()),
        "mismatched": mismatched,
        "seconds": round(time.perf_counter() - begun, 1),
    }
    if as_json:
        print(json.dumps(summary))
    else:
        for source, written, cosine in list(zip(texts, decoded.texts, decoded.cosines, strict=True))[:5]:
            print(f"{cosine:+.3f}  {source}\n        {written}")
        for name, value in summary.items():
            print(f"{name:10} {value:.4f}" if isinstance(value, float) else f"{name:10} {value}")
    if encoded.truncated.any():
        echo(
            f"warning: {int(encoded.truncated.sum())} of {len(texts)} texts are longer than "
            f"{loaded.identity.max_tokens} tokens and were truncated; the rest cannot be read back"
        )
    if mismatched:
        echo(
            f"warning: mean cosine {mean:.3f} suggests that encoder and decoder do not match (a mismatched pair gives "
            f"0.05 to 0.11, a matching one 0.63 or more). Check that both belong to codec {loaded.identity}"
        )
        raise SystemExit(1)


if __name__ == "__main__":
    run(main)
