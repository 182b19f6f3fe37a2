"""Fit a codec with Ray Train: `latent train-codec`. Reads articles or chunks, writes a codec folder.

    python -m jobs.train_codec --input articles.jsonl.gz --output out/codec --minutes 60
    python -m jobs.train_codec --chunks out/mine/chunks --output out/codec --init lvm/codec/weights/mini
    ray job submit --working-dir . -- python -m jobs.train_codec --chunks /shared/chunks --output /shared/codec

The folder holds encoder, hypothesizer, tokenizer and config.json, and is what --codec-path takes. The training loop
is `lvm.codec.training.fit`; it saves every five minutes, and the same command run again resumes, also after a kill.
With --init it starts from a codec's weights, which a small corpus needs. With --freeze-encoder as well, vectors stay
as they were and only the decoder changes. Two cores process about 1,500 chunks per minute, 4,000 with a frozen
encoder.
"""

import json
import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import typer

from jobs._ray import Address, PathOrUrl, articles_of, connect, echo, finish, path_option, run, worker_device
from jobs._training import output_on_disk, train_on_one_worker
from lvm.codec.mini import MiniConfig
from lvm.codec.tokenizer import ChunkTokenizer
from lvm.codec.training import TrainingSettings, fit, load_weights, require_same_run
from lvm.codec.zoo import CODECS
from lvm.corpus.chunker import Chunker
from lvm.errors import InputError
from lvm.storage import local_folder, location
from lvm.vectors.sequences import MAX_SEED


def train_loop_per_worker(loop: dict[str, Any]) -> None:
    """The training on one worker; reports each held-out score."""
    from ray import train

    config = MiniConfig()
    fit(
        local_folder(loop["chunks"]),
        ChunkTokenizer.load(loop["output"] / "tokenizer.json", config.max_tokens),
        loop["output"],
        config,
        loop["settings"],
        str(worker_device(mini=True)),
        on_score=train.report,
        init=None if loop["init"] is None else local_folder(loop["init"]),
    )


def make_chunks(source: str, tokenizer: ChunkTokenizer, folder: Path) -> None:
    """Write the chunks of all articles as one shard with `doc_id`, `position` and `text`, as training reads them.

    Done once: a second run reuses them. Raises InputError when the folder's chunks have another source or tokenizer.
    """
    wanted = {"source": source, "tokenizer_sha256": tokenizer.sha256}
    made = folder / "made_from.json"
    if made.is_file():
        found = json.loads(made.read_text())
        if found["source"] != source:
            raise InputError(
                f"{folder} holds chunks of {found['source']}, got --input {source}; choose another --output"
            )
        if found != wanted:
            raise InputError(
                f"{folder} was made with tokenizer {found['tokenizer_sha256'][:16]}, got --tokenizer "
                f"{tokenizer.sha256[:16]}; choose another --output"
            )
        return
    chunker = Chunker(tokenizer)
    rows = [
        {"doc_id": number, "position": position, "text": chunk.text}
        for number, article in enumerate(articles_of(source, None))
        for position, chunk in enumerate(chunker.chunk([article])[0])
    ]
    if not rows:
        raise InputError(f"{source} has no chunks; expected articles with text")
    folder.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([("doc_id", pa.int32()), ("position", pa.int32()), ("text", pa.string())])
    pq.write_table(pa.Table.from_pylist(rows, schema), folder / "part-00000.parquet")
    made.write_text(json.dumps(wanted) + "\n")
    echo(f"{len(rows):,} chunks of {source} in {folder}")


def main(
    output: Annotated[PathOrUrl, path_option("Folder of the codec, on a disk; resumes a run in it.")],
    input: Annotated[str | None, typer.Option(help="Articles, as for `latent chunk`, or sample.")] = None,
    chunks: Annotated[PathOrUrl | None, path_option("Chunks of `latent chunk` instead of --input.")] = None,
    minutes: Annotated[float, typer.Option(help="Total training time, resumed runs included.")] = 60.0,
    tokenizer: Annotated[
        PathOrUrl,
        typer.Option(
            parser=location, metavar="PATH", help="tokenizer.json of the chunks.", show_default="mini's"
        ),
    ] = CODECS["mini"] / "tokenizer.json",
    init: Annotated[PathOrUrl | None, path_option("Codec whose weights a new run starts from.")] = None,
    freeze_encoder: Annotated[
        bool, typer.Option("--freeze-encoder", help="Fit only the hypothesizer; needs --init.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of weights, batches and noise.")] = 7,
    address: Address = None,
) -> None:
    """Fit a codec for the given time, then write its weights."""
    settings = TrainingSettings(minutes=minutes, seed=seed, freeze_encoder=freeze_encoder)
    if (input is None) == (chunks is None):
        raise InputError("expected either --input (articles) or --chunks (made by `latent chunk`)")
    tokenizer = local_folder(tokenizer.parent) / tokenizer.name
    chunk_tokenizer = ChunkTokenizer.load(tokenizer, MiniConfig().max_tokens)
    output = output_on_disk(output)
    if input is not None:
        chunks = output / "chunks"
        make_chunks(input, chunk_tokenizer, chunks)
    assert chunks is not None
    if not list(chunks.glob("*.parquet")):
        raise InputError(f"no *.parquet in {chunks}; expected a folder made by `latent chunk`")
    if init is not None:
        load_weights(
            local_folder(init), MiniConfig(), chunk_tokenizer
        )  # fail here, not in a worker minutes later
    require_same_run(output, local_folder(chunks), chunk_tokenizer, MiniConfig(), settings)
    shutil.copyfile(tokenizer, output / "tokenizer.json")
    begun = time.perf_counter()
    connect(address)
    config = {
        "chunks": chunks.absolute(),
        "output": output,
        "settings": settings,
        "init": None if init is None else init.absolute(),
    }
    train_on_one_worker(train_loop_per_worker, config, "codec", minutes)
    # Ray keeps metrics only of reports with a checkpoint, and this loop's checkpoint is in `output`.
    score = json.loads((output / "config.json").read_text())["held_out"]
    finish(
        "train-codec",
        rows=int(score["chunks_seen"]),
        score=score,
        seconds=round(time.perf_counter() - begun, 1),
        paths={"codec": str(output)},
    )


if __name__ == "__main__":
    run(main)
