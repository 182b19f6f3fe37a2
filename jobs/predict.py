"""Predict the text that follows: reads a model and optionally a corpus, prints the text, writes nothing.

    python -m jobs.predict "one" "two" "three" "four" "five"
    python -m jobs.predict --model lstm --run out/mine < article.txt

Each argument is one chunk; standard input is one text, which is cut into chunks. The predictor reads the last chunks,
as many as it was trained on. Without --run, the predictors shipped with the package are used. The text goes to stdout;
its source and timings go to stderr.
"""

import json
import sys
import time
from dataclasses import asdict
from typing import Annotated

import typer

from jobs._ray import (
    CodecName,
    CodecPath,
    LanguageModel,
    PathOrUrl,
    WriterFolder,
    echo,
    load_codec_at,
    path_option,
)
from jobs._ray import run as run_main
from lvm.codec.ladder import LadderSettings
from lvm.corpus.chunker import chunk_article
from lvm.corpus.records import Article
from lvm.errors import InputError
from lvm.predict.generate import Generator, Prediction
from lvm.predict.steer import PASSTHROUGH

WORDS = {
    "exact": "read back: the vector is this text's own",
    "writer": "written by a language model from the predicted vector",
    "corpus": "from the corpus: the chunk nearest to the prediction",
}
"""A text's source in words."""


def main(
    texts: Annotated[list[str] | None, typer.Argument(help="Chunks in order, the latest last.")] = None,
    model: Annotated[str, typer.Option(help="Alias or folder of a trained model, or passthrough.")] = "gru",
    run: Annotated[
        PathOrUrl | None,
        path_option(
            "Folder of `latent run` or `latent demo`; default: the shipped models, without a corpus."
        ),
    ] = None,
    length: Annotated[int, typer.Option(min=1, help="Number of chunks to predict.")] = 1,
    candidates: Annotated[int, typer.Option(min=1, help="Drafts per vector; the best is returned.")] = 4,
    codec: CodecName = "mini",
    codec_path: CodecPath = None,
    writer: WriterFolder = None,
    language_model: LanguageModel = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON per chunk.")] = False,
) -> None:
    """Predict and print the next text."""
    if run is not None and not run.is_dir():
        raise InputError(
            f"no folder {run}; expected the output of `latent run` (--run DIR). Try `latent demo` first"
        )
    begun = time.perf_counter()
    loaded = load_codec_at(codec, codec_path, writer, language_model)
    generator = Generator.load(run, model, loaded, LadderSettings(candidates=candidates))
    if texts:
        chunks = texts
    else:
        text = _standard_input()
        chunks = [c.text for c in chunk_article(Article("stdin", "", text, "stdin"), loaded.tokenizer)]
    if not any(c.strip() for c in chunks):
        raise InputError("expected texts as arguments or a text on standard input, got only white space")
    if loaded.no_writer is not None:
        echo(f"note: {loaded.no_writer}")
    loaded_ms = (time.perf_counter() - begun) * 1000
    for number, (prediction,) in enumerate(generator.continue_all([chunks], length)):
        if prediction.truncated and not number:
            limit = loaded.tokenizer.max_tokens
            echo(
                f"warning: {prediction.truncated} of the texts read were longer than {limit} tokens and were truncated"
            )
        if as_json:
            print(
                json.dumps(record(prediction, loaded.identity.to_dict(), generator.ladder.digest, loaded_ms))
            )
        else:
            print_prediction(prediction, loaded_ms)
        loaded_ms = 0.0


def record(
    prediction: Prediction, codec: dict[str, object], decoder: str, loaded_ms: float
) -> dict[str, object]:
    """A prediction as JSON."""
    answer = prediction.answer
    return {
        "text": answer.text,
        "source": answer.source,
        "cosine": answer.cosine,
        "log_prob": answer.log_prob,
        "steps": answer.steps,
        "refusals": answer.refusals,
        "attempts": [asdict(a) for a in answer.attempts],
        "extract": None if prediction.extract is None else asdict(prediction.extract),
        "model": prediction.model,
        "codec": codec,
        "decoder": decoder,
        "context_mode": prediction.context.mode,
        "context": prediction.context.texts,
        "snapped_cosine": prediction.snapped_cosine,
        "truncated": prediction.truncated,
        "milliseconds": {"load": round(loaded_ms, 1), **prediction.milliseconds},
    }


def print_prediction(prediction: Prediction, loaded_ms: float) -> None:
    """Print the text to stdout, details to stderr."""
    answer = prediction.answer
    print(answer.text, flush=True)
    likely = "" if answer.log_prob is None else f", log-probability {answer.log_prob:.2f} nats per character"
    echo(f"{WORDS[answer.source]}  (cosine to the prediction {answer.cosine:.3f}{likely})")
    echo(f"model {prediction.model}  context {prediction.context.mode}")
    for attempt in answer.attempts:
        echo(f"  refused, {attempt.source}: {attempt.text!r} ({'; '.join(attempt.refusals)})")
    for refusal in answer.refusals:
        echo(f"  refused, but returned for lack of a better one: {refusal}")
    shown = "  ".join(f"{stage} {ms:.1f} ms" for stage, ms in prediction.milliseconds.items())
    echo(f"load {loaded_ms:.0f} ms  {shown}")
    if prediction.model == PASSTHROUGH:
        echo("passthrough makes no prediction: this is the last chunk, read back")


def _standard_input() -> str:
    if sys.stdin.isatty():
        raise InputError("expected texts as arguments or a text on standard input, got neither")
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as err:
        raise InputError(
            f"standard input is not UTF-8 ({err.reason} at byte {err.start}); convert it first"
        ) from err


if __name__ == "__main__":
    run_main(main)
