"""How TMD codes are spread over real chunks, and how often they are what a reader says.

Chunks are cut and encoded as the jobs do, from the first articles of the input until there are enough; the codes are
those of the nearest prototypes. Entropy says that no label swallows the rest, not that labels are right: the agreement
with 100 hand-labelled chunks (tests/data/tmd_labels.jsonl) says that. No timing here.

    python -m tests.bench.tmd_codes --input articles.jsonl.gz              # 10,000 chunks
    python -m tests.bench.tmd_codes --chunks 500                           # of the bundled sample

The last line of stdout is one JSON object.
"""

import argparse
import json
from importlib.metadata import version

from lvm.codec.zoo import load_codec
from lvm.corpus.chunker import Chunker
from lvm.corpus.readers import read_articles
from lvm.corpus.tmd import AXES, Prototypes, distribution, distribution_table, phrases, unpack
from lvm.storage import location
from tests.tmd_labels import agreement, agreement_table, read_labels


def read_chunks(source: str, wanted: int, tokenizer: object) -> list[str]:
    """Texts of the first `wanted` chunks of an input."""
    chunker = Chunker(tokenizer)  # type: ignore[arg-type]
    texts: list[str] = []
    for article in read_articles(source if source == "sample" else location(source)):
        texts += [c.text for c in chunker.chunk([article])[0]]
        if len(texts) >= wanted:
            break
    return texts[:wanted]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", default="sample")
    parser.add_argument("--chunks", type=int, default=10_000)
    parser.add_argument("--codec", default="mini")
    parser.add_argument("--codec-path")
    args = parser.parse_args()
    codec = load_codec(args.codec, args.codec_path)
    prototypes = Prototypes(codec.encode([phrase for phrase, _ in phrases()]))
    texts = read_chunks(args.input, args.chunks, codec.tokenizer)
    codes = prototypes.codes(codec.encode(texts)).tolist()
    spread = distribution(codes)
    labelled, wanted = read_labels()
    report = agreement([c.tmd for c in prototypes.nearest(codec.encode(labelled))], wanted)
    print(f"{len(texts):,} chunks of {args.input}, {spread['different']:,} different codes\n")
    print(distribution_table(codes, top=8))
    print(f"\n{len(labelled)} labelled chunks\n")
    print(agreement_table(report))
    for code in codes[:: max(1, len(codes) // 10)][:10]:
        print(f"- {', '.join(unpack(code).names)}")
    print(
        json.dumps(
            {
                "chunks": len(texts),
                "input": args.input,
                "codec": codec.identity.to_dict(),
                "entropy": {axis: spread[axis]["entropy"] for axis in AXES} | {"code": spread["entropy"]},
                "different": spread["different"],
                "agreement": report,
                "versions": {n: version(n) for n in ("torch", "numpy")},
            }
        )
    )


if __name__ == "__main__":
    main()
