"""Predict the text after five texts. Reads a folder of `latent run`, prints the text, writes nothing.

    python -m jobs.predict --model lstm "one" "two" "three" "four" "five"
    python -m jobs.predict --model gru --run out/mine < article.txt

Texts as arguments are one chunk each; standard input is one text, cut into chunks of which the last five count.
The text goes to stdout, what it cost and how it came about to stderr.
"""

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from jobs._ray import PathOrUrl, load_codec_at, path_option, say
from jobs._ray import run as run_main
from lvm.corpus.chunker import chunk_article
from lvm.corpus.readers import Article
from lvm.errors import InputError
from lvm.predict.generate import PASSTHROUGH, Generator

DEMO_RUN = Path("out/demo")


def main(
    texts: Annotated[list[str] | None, typer.Argument(help="Chunks in order, the latest last.")] = None,
    model: Annotated[str, typer.Option(help="Alias or folder of a trained model, or passthrough.")] = "lstm",
    run: Annotated[PathOrUrl, path_option("Folder of `latent run` or `latent demo`.")] = DEMO_RUN,
    codec: Annotated[str, typer.Option(help="Codec name.")] = "mini",
    codec_path: Annotated[PathOrUrl | None, path_option("Folder of a codec of your own.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Everything as one line of JSON on stdout.")
    ] = False,
) -> None:
    """Print the predicted text."""
    if not run.is_dir():
        raise InputError(
            f"no folder {run}; expected the output of `latent run` (--run DIR). Try `latent demo` first"
        )
    begun = time.perf_counter()
    loaded = load_codec_at(codec, codec_path)
    generator = Generator.load(run, model, loaded)
    if texts:
        chunks = texts
    else:
        text = _standard_input()
        chunks = [c.text for c in chunk_article(Article("stdin", "", text, "stdin"), loaded.tokenizer)]
    if not any(c.strip() for c in chunks):
        raise InputError("expected texts as arguments or one text on standard input, got only white space")
    loaded_ms = (time.perf_counter() - begun) * 1000
    prediction = generator.next_chunk(chunks)
    if prediction.truncated:
        limit = loaded.tokenizer.max_tokens
        say(
            f"warning: {prediction.truncated} of {len(chunks)} texts were longer than {limit} tokens and were cut"
        )
    answer = prediction.answer
    if as_json:
        print(
            json.dumps(
                {
                    "text": answer.text,
                    "cosine": answer.cosine,
                    "rung": answer.rung,
                    "reasons": answer.reasons,
                    "model": prediction.model,
                    "codec": loaded.identity.to_dict(),
                    "context_mode": prediction.context.mode,
                    "context": prediction.context.texts,
                    "snapped_cosine": prediction.snapped_cosine,
                    "truncated": prediction.truncated,
                    "milliseconds": {"load": round(loaded_ms, 1), **prediction.milliseconds},
                }
            )
        )
        return
    print(answer.text)
    say(
        f"model {prediction.model}  context {prediction.context.mode}  similarity {answer.cosine:.3f} "
        f"(text to prediction)  rung {answer.rung}"
    )
    for reason in answer.reasons:
        say(f"  climbed: {reason}")
    shown = "  ".join(f"{stage} {ms:.1f} ms" for stage, ms in prediction.milliseconds.items())
    say(f"load {loaded_ms:.0f} ms  {shown}")
    if prediction.model == PASSTHROUGH:
        say("passthrough predicts nothing: this is the last chunk, read back")


def _standard_input() -> str:
    if sys.stdin.isatty():
        raise InputError("expected texts as arguments or one text on standard input, got neither")
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as err:
        raise InputError(
            f"standard input is not UTF-8 ({err.reason} at byte {err.start}); convert it first"
        ) from err


if __name__ == "__main__":
    run_main(main)
