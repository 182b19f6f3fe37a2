"""Fit a codec on chunk shards with Ray Train. Reads chunks, writes a codec folder.

    python -m jobs.train_codec --chunks out/mine/chunks --output out/codec --minutes 60
    ray job submit --working-dir . -- python -m jobs.train_codec --chunks /shared/chunks --output /shared/codec

The folder holds encoder, hypothesizer, tokenizer and config.json and is what --codec-path takes. The loop is
`lvm.codec.training.fit`; it saves every five minutes, and the same command run again goes on from there, also
after a kill. A minute on two cores sees about 4,500 chunks; the shipped `mini` took 36.
"""

import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs._ray import Address, connect, finish, run, say
from lvm.codec.mini import MiniConfig
from lvm.codec.tokenizer import ChunkTokenizer
from lvm.codec.training import TrainingSettings, fit
from lvm.codec.zoo import CODECS
from lvm.errors import InputError


def train_loop_per_worker(loop: dict[str, Any]) -> None:
    """One worker's whole training; reports each held-out score."""
    import torch
    from ray import train

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = MiniConfig()
    fit(
        loop["chunks"],
        ChunkTokenizer.load(loop["tokenizer"], config.max_tokens),
        loop["output"],
        config,
        loop["settings"],
        device,
        on_score=train.report,
    )


def main(
    chunks: Annotated[Path, typer.Option(help="Folder of chunk shards, made by `latent chunk`.")],
    output: Annotated[Path, typer.Option(help="Folder of the codec; a run there is continued.")],
    minutes: Annotated[float, typer.Option(help="Time of training, all parts together.")] = 60.0,
    tokenizer: Annotated[Path, typer.Option(help="tokenizer.json the chunks were cut with.")] = CODECS["mini"]
    / "tokenizer.json",
    seed: Annotated[int, typer.Option(help="Seed of weights, batches and noise.")] = 7,
    address: Address = None,
) -> None:
    """Train until the minutes are spent, then write the weights."""
    settings = TrainingSettings(minutes=minutes, seed=seed)
    if not list(chunks.glob("*.parquet")):
        raise InputError(f"no *.parquet in {chunks}; expected a folder made by `latent chunk`")
    ChunkTokenizer.load(tokenizer, MiniConfig().max_tokens)
    output = output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(tokenizer, output / "tokenizer.json")
    begun = time.perf_counter()
    connect(address)
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    use_gpu = ray.cluster_resources().get("GPU", 0) >= 1
    say(
        f"training for {minutes:g} minutes on {'a GPU' if use_gpu else 'CPUs'}; curve in {output / 'curve.jsonl'}"
    )
    trainer = TorchTrainer(
        train_loop_per_worker,
        train_loop_config={
            "chunks": chunks.absolute(),
            "tokenizer": tokenizer.absolute(),
            "output": output,
            "settings": settings,
        },
        scaling_config=ScalingConfig(num_workers=1, use_gpu=use_gpu),
        # The worker's own checkpoint lies in `output`; a lost worker starts again and goes on from it.
        run_config=RunConfig(
            name="codec", storage_path=str(output / "ray"), failure_config=FailureConfig(max_failures=2)
        ),
    )
    result = trainer.fit()
    finish(
        {
            "stage": "train-codec",
            "rows": int(result.metrics["chunks_seen"]),
            "score": result.metrics,
            "seconds": round(time.perf_counter() - begun, 1),
            "paths": {"codec": str(output)},
        }
    )


if __name__ == "__main__":
    run(main)
