"""Predict the text that follows: reads a model and optionally a corpus, prints the text, writes nothing.

    python -m jobs.predict "one" "two" "three" "four" "five"
    python -m jobs.predict --model lstm --run out/mine < article.txt

Each argument is one chunk, or is cut into chunks if longer than one; standard input is one text, which is cut into
chunks. The predictor reads the last chunks, as many as it was trained on. Without --run, the bundled predictors are
used. The text goes to stdout, its source to stderr; --json has timings too.
"""

import json
import sys
import time
from dataclasses import asdict
from typing import Annotated

import typer

import lvm
from jobs._ray import (
    CodecName,
    CodecPath,
    LanguageModel,
    ModelName,
    PathOrUrl,
    WriterFolder,
    echo,
    load_codec_at,
    model_of,
    path_option,
)
from jobs._ray import run as run_main
from lvm.codec.ladder import LadderSettings
from lvm.codec.tokenizer import require_texts
from lvm.errors import InputError
from lvm.predict.generate import Generator, Prediction
from lvm.predict.steer import PASSTHROUGH

WORDS = {
    "exact": "read back: the vector is this text's own",
    "writer": "written by a language model from the predicted vector",
    "corpus": "from the corpus: the chunk nearest to the prediction",
}
"""A text's source in words."""

_CONTEXTS = {
    "repeat_pad": "; the context was repeated to fill the model's",
    "ann": "; the context was retrieved from the corpus",
    "mixed": "; the context was completed from the corpus",
}


def main(
    texts: Annotated[
        list[str] | None, typer.Argument(help="Chunks or texts in order, the latest last.")
    ] = None,
    model: ModelName = None,
    run: Annotated[
        PathOrUrl | None,
        path_option(
            "Folder of `latent run` or `latent demo`; default: the bundled models, without a corpus."
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
    generator = Generator.load(run, model_of(run, model), loaded, LadderSettings(candidates=candidates))
    if texts:
        require_texts(texts)
        longest = loaded.tokenizer.max_tokens
        chunks = []
        for text, tokens in zip(texts, loaded.tokenizer.count(texts), strict=True):
            chunks += lvm.chunk(text, loaded) if tokens > longest else [text]
    else:
        chunks = lvm.chunk(_standard_input(), loaded)
    if not any(c.strip() for c in chunks):
        raise InputError("expected texts as arguments or a text on standard input, got only white space")
    if loaded.no_writer is not None:
        echo(f"note: {loaded.no_writer}")
    loaded_ms = (time.perf_counter() - begun) * 1000
    for (prediction,) in generator.continue_all([chunks], length):
        if as_json:
            print(
                json.dumps(record(prediction, loaded.identity.to_dict(), generator.ladder.digest, loaded_ms))
            )
        else:
            print_prediction(prediction)
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


def print_prediction(prediction: Prediction) -> None:
    """Print the text to stdout, where it comes from to stderr."""
    answer = prediction.answer
    print(answer.text, flush=True)
    filled = _CONTEXTS.get(prediction.context.mode, "")
    echo(f"  {WORDS[answer.source]}; cosine to it {answer.cosine:.2f}; model {prediction.model}{filled}")
    for attempt in answer.attempts:
        echo(f"  refused, {attempt.source}: {attempt.text!r} ({'; '.join(attempt.refusals)})")
    for refusal in answer.refusals:
        echo(f"  refused, but returned for lack of a better one: {refusal}")
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
