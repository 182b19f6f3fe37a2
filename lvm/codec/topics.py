"""Fits the topic part of `mini` to a teacher's vectors, so that meaning and not only shared words brings texts near.

    python -m lvm.codec.topics --chunks CHUNKS --teacher FOLDER --init CODEC_DIR --output RUN_DIR --minutes 60

Reads chunk shards (Parquet with `doc_id`, `position`, `text`, rows in article order), a sentence-transformers model
(`FOLDER`) and a codec to start from. Writes `teacher/part-*.npy` (the teacher's vectors, made once), `checkpoint.pt`
(continued by itself when run again), `curve.jsonl` (a line a minute), and at the end `encoder.safetensors`.

Two losses, added: one less the cosine of the topic part to a linear image of the teacher's vector (its leading
principal components, which keep the teacher's cosines), and InfoNCE between neighbouring chunks. Words and order stay
as they are; only what is read from a vector's topics has to be learnt again, by `lvm.codec.training
--freeze-encoder`.

The bag of topic embeddings starts from its least-squares solution, which alone is most of the way; the T5 blocks add
what a bag cannot know.

Letters: N chunks, B batch, T tokens, V vocabulary, P = 256 (topic), Q the teacher's vector length.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from lvm.codec.mini import MiniConfig, MiniEncoder
from lvm.codec.sentence import load_sentence_encoder
from lvm.codec.tokenizer import ChunkTokenizer
from lvm.codec.training import ChunkTokens, infonce, neighbours_of, recentre
from lvm.errors import InputError, TrainingError

Vectors = npt.NDArray[np.float16]


@dataclass(frozen=True)
class TopicSettings:
    """How the topic part is fitted; saved with the weights."""

    minutes: float = 60.0
    """Time of training, all resumed parts together; the learning rate falls to zero at its end."""
    batch_pairs: int = 128
    """Neighbour pairs a step."""
    learning_rate: float = 6e-4
    """Peak of AdamW's step size."""
    warmup_steps: int = 100
    """Steps of linear rise."""
    contrast_weight: float = 0.05
    """Weight of InfoNCE (nats) beside one less the cosine."""
    temperature: float = 0.06
    """Temperature of InfoNCE on cosines."""
    reach: int = 2
    """A neighbour lies at most this many chunks further on in the same article."""
    held_out_share: float = 0.01
    """Share of articles kept for the curve (at least 20)."""
    seed: int = 11
    """Seed of batches and new weights."""

    def __post_init__(self) -> None:
        if self.minutes <= 0:
            raise InputError(f"minutes must be above 0, got {self.minutes}")
        if self.batch_pairs < 2:
            raise InputError(
                f"batch_pairs must be at least 2 (InfoNCE needs a negative), got {self.batch_pairs}"
            )


def teach(chunks: Path, folder: Path, output: Path, limit: int | None, device: str) -> Vectors:
    """The teacher's unit vectors (N, Q) float16 of the first chunks, in order; shards that are there are not
    made again."""
    output.mkdir(parents=True, exist_ok=True)
    where = torch.device(device)
    teacher, _ = load_sentence_encoder(folder, where)
    parts: list[Vectors] = []
    rows, made, begun = 0, 0, time.perf_counter()
    for file in sorted(chunks.glob("*.parquet")):
        path = output / f"{file.stem}.npy"
        if not path.exists():
            texts = pq.read_table(file, columns=["text"]).column(0).to_pylist()
            vectors = teacher.encode(texts).vectors.astype(np.float16)
            temporary = path.with_suffix(".tmp")
            with temporary.open("wb") as out:
                np.save(out, vectors)
            os.replace(temporary, path)
            made += len(texts)
            rate = made / (time.perf_counter() - begun)
            print(f"teacher: {rows + len(texts):,} chunks, {rate:.0f} a second", flush=True)
        parts.append(np.load(path))
        rows += len(parts[-1])
        if limit is not None and rows >= limit:
            break
    if not parts:
        raise InputError(f"no *.parquet in {chunks}; expected chunk shards, make them with `latent chunk`")
    return np.concatenate(parts)[:limit]


@dataclass(frozen=True)
class Image:
    """The linear map under which the topic part should look like the teacher's vector."""

    mean: Tensor
    """(Q,) mean of the teacher's vectors."""
    directions: Tensor
    """(Q, P) orthonormal columns, the leading principal components (Q at most P: all of them, and zeros)."""

    @classmethod
    def fit(cls, vectors: Vectors, dim: int) -> "Image":
        """From at most 100,000 of the vectors, evenly spread."""
        rows = np.linspace(0, len(vectors) - 1, min(len(vectors), 100_000)).astype(np.int64)
        some = torch.from_numpy(vectors[rows].astype(np.float32))
        mean = some.mean(0)
        _, axes = torch.linalg.eigh((some - mean).T @ (some - mean))
        axes = axes.flip(1)[:, :dim]
        return cls(mean, F.pad(axes, (0, dim - axes.shape[1])).contiguous())

    def __call__(self, vectors: Vectors) -> Tensor:
        """(B, Q) to (B, P) float32 unit rows."""
        given = torch.from_numpy(vectors.astype(np.float32))
        return F.normalize((given - self.mean) @ self.directions, dim=-1)


def solve_bag(
    data: ChunkTokens, rows: npt.NDArray[np.int64], vectors: Vectors, image: Image, V: int
) -> Tensor:
    """Topic embeddings (V, P) whose sum over a text, by the root of its length, is nearest to the image; float32.

    Ridge regression in closed form, with a penalty of one occurrence for each piece.
    """
    from scipy.sparse import csr_matrix

    gram = np.zeros((V, V), np.float32)
    cross = np.zeros((V, image.directions.shape[1]), np.float32)
    for low in range(0, len(rows), 50_000):
        part = rows[low : low + 50_000]
        lengths = data.ends[part] - data.starts[part]
        columns = np.concatenate([data.ids[data.starts[r] : data.ends[r]] for r in part]).astype(np.int64)
        weights = np.repeat(1 / np.sqrt(lengths), lengths).astype(np.float32)
        counts = csr_matrix(
            (weights, columns, np.concatenate(([0], np.cumsum(lengths)))), shape=(len(part), V)
        )
        counts.sum_duplicates()
        gram += (counts.T @ counts).toarray()
        cross += counts.T @ image(vectors[part]).numpy()
    system = torch.from_numpy(gram)
    system.diagonal().add_(1.0 / 26)
    table: Tensor = torch.linalg.solve(system, torch.from_numpy(cross))
    return table


def grown(encoder: MiniEncoder, layers: int) -> MiniEncoder:
    """The encoder with this many blocks: its own, and new ones that change nothing until they are trained."""
    config = MiniConfig(**{**encoder.config.to_dict(), "encoder_layers": layers})
    bigger = MiniEncoder(config)
    bigger.load_state_dict(encoder.state_dict(), strict=False)
    with torch.no_grad():
        for name, parameter in bigger.contextual.named_parameters():
            number = name.split(".")[1] if name.startswith("block.") else "0"
            if int(number) >= encoder.config.encoder_layers and name.endswith(
                ("SelfAttention.o.weight", "wo.weight")
            ):
                parameter.zero_()
    return bigger


def spearman(first: npt.NDArray[Any], second: npt.NDArray[Any]) -> float:
    """Rank correlation of two equally long rows of numbers."""
    ranks = [np.argsort(np.argsort(x)).astype(np.float64) for x in (first, second)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


@torch.inference_mode()
def held_out_score(
    encoder: MiniEncoder,
    data: ChunkTokens,
    rows: npt.NDArray[np.int64],
    vectors: Vectors,
    image: Image,
    pad: int,
) -> dict[str, float]:
    """Cosine to the image; rank correlation of cosines with the teacher's over pairs of one article and of strangers;
    how often the next chunk is among the ten nearest of all held out, beside the teacher's share."""
    topics = []
    for part in np.array_split(rows, max(1, len(rows) // 256)):
        ids, mask = data.batch(part, pad)
        topic = encoder.topic(ids, encoder.tokens(ids), mask) - encoder.centre
        topics.append(F.normalize(topic, dim=-1))
    own = torch.cat(topics).numpy()
    truth = vectors[rows].astype(np.float32)
    docs = data.doc_ids[rows]
    rng = np.random.default_rng(0)
    first = rng.integers(0, len(rows) - 8, 20_000)
    further = first + rng.integers(1, 8, len(first))
    within = docs[further] == docs[first]
    near = np.stack((further[within], first[within]))
    far = rng.integers(0, len(rows), near.shape)
    pairs = np.concatenate((near, far), axis=1)
    ours, theirs = ((x[pairs[0]] * x[pairs[1]]).sum(1) for x in (own, truth))
    return {
        "cosine": float((own * image(vectors[rows]).numpy()).sum(1).mean()),
        "spearman": spearman(ours, theirs),
        "next_r10": next_r10(own, docs),
        "teacher_next_r10": next_r10(truth, docs),
    }


def next_r10(vectors: npt.NDArray[np.float32], docs: npt.NDArray[np.int32]) -> float:
    """Share of chunks whose next one is among the ten nearest to the mean of the five before it, those left out.

    The mean is weighted 1 to 5, the last most; vectors (N, D) unit rows in article order.
    """
    last = np.flatnonzero(docs[5:] == docs[:-5]) + 5
    weighted = np.stack([(k + 1) * vectors[last - 5 + k] for k in range(5)]).sum(0)
    hits = 0
    for low in range(0, len(last), 1024):
        targets = last[low : low + 1024]
        scores = weighted[low : low + 1024] @ vectors.T
        here = np.arange(len(targets))
        truth = scores[here, targets]
        for k in range(1, 6):
            scores[here, targets - k] = -np.inf
        hits += int(((scores >= truth[:, None]).sum(1) <= 10).sum())
    return hits / max(1, len(last))


def fit_topics_to(
    chunks: Path,
    teacher: Path,
    init: Path,
    output: Path,
    layers: int,
    settings: TopicSettings,
    device: str = "cpu",
    limit: int | None = None,
    compiled: bool = False,
    score_every_s: float = 60.0,
) -> dict[str, Any]:
    """Train until `settings.minutes` are spent, going on from `output/checkpoint.pt` if it is there; the last score.

    init: folder of the codec whose words, order and tokenizer stay. Raises InputError where it does not load or
    another run's checkpoint is in `output`, TrainingError when a loss is no number.
    """
    vectors = teach(chunks, teacher, output / "teacher", limit, device)
    config = MiniConfig(**json.loads((init / "config.json").read_text())["config"])
    tokenizer = ChunkTokenizer.load(init / "tokenizer.json", config.max_tokens)
    data = ChunkTokens.read(chunks, tokenizer, len(vectors))
    train, held = data.split(settings.held_out_share, settings.seed)
    train, held = train[train < len(vectors)], held[held < len(vectors)][:10_000]
    image = Image.fit(vectors[train], config.topic_dim)
    has_next = np.zeros(len(data), bool)
    has_next[:-1] = data.doc_ids[:-1] == data.doc_ids[1:]
    anchors = train[has_next[train] & (train + settings.reach < len(vectors))]
    print(f"{len(train):,} chunks to train on, {len(held):,} held out", flush=True)

    torch.manual_seed(settings.seed)
    before = MiniEncoder(config)
    before.load_state_dict(load_file(init / "encoder.safetensors"))
    encoder = grown(before, layers)
    checkpoint = output / "checkpoint.pt"
    state: dict[str, Any] | None = None
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        if state["config"] != encoder.config.to_dict():
            raise InputError(f"{checkpoint} is of another configuration; choose another --output")
        encoder.load_state_dict(state["encoder"])
    else:
        start = held_out_score(before.eval(), data, held, vectors, image, tokenizer.pad_id)
        print(json.dumps({"start": start}), flush=True)
        with torch.no_grad():
            encoder.topics.weight.copy_(solve_bag(data, train, vectors, image, config.vocabulary_size))
            scale = encoder.topics.weight.norm(dim=1).mean()
            encoder.topics.weight.div_(scale)
            encoder.outward.weight.normal_(std=0.02 * (2 * config.lexical_dim) ** -0.5)
    encoder.to(device)
    encoder.tokens.requires_grad_(False)
    matrices = [
        p
        for n, p in encoder.named_parameters()
        if p.requires_grad and p.ndim == 2 and not n.startswith("topics")
    ]
    chosen = {id(p) for p in matrices}
    others = [p for p in encoder.parameters() if p.requires_grad and id(p) not in chosen]
    optimiser = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=(0.9, 0.98),
    )
    step, spent_s = 0, 0.0
    if state is not None:
        optimiser.load_state_dict(state["optimiser"])
        step, spent_s = state["step"], state["spent_s"]
        print(f"going on from step {step}, {spent_s / 60:.1f} minutes spent", flush=True)
    rng = np.random.default_rng((settings.seed, step))
    contextual = torch.compile(encoder.topic) if compiled else encoder.topic
    kind = torch.device(device).type
    last_score = spent_s if step else -score_every_s
    recent: list[tuple[float, float]] = []
    score: dict[str, float] = {}
    while True:
        done = spent_s >= settings.minutes * 60
        # --- score, log and save
        if done or spent_s - last_score >= score_every_s:
            encoder.eval()
            recentre(encoder, data, train, tokenizer.pad_id)
            score = held_out_score(encoder, data, held, vectors, image, tokenizer.pad_id)
            encoder.train()
            mean = np.mean(recent, axis=0) if recent else (float("nan"), float("nan"))
            line = {
                "step": step,
                "minutes": round(spent_s / 60, 2),
                "chunks_per_s": round(2 * settings.batch_pairs * step / max(spent_s, 1e-9), 1),
                "cosine_loss": round(float(mean[0]), 4),
                "contrast_nats": round(float(mean[1]), 4),
                **{k: round(v, 4) for k, v in score.items()},
            }
            with (output / "curve.jsonl").open("a") as curve:
                curve.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
            recent, last_score = [], spent_s
            temporary = checkpoint.with_suffix(".tmp")
            torch.save(
                {
                    "config": encoder.config.to_dict(),
                    "encoder": encoder.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "step": step,
                    "spent_s": spent_s,
                },
                temporary,
            )
            os.replace(temporary, checkpoint)
        # --- stop
        if done:
            break
        # --- step
        begun = time.perf_counter()
        gone = spent_s / (settings.minutes * 60)
        for group in optimiser.param_groups:
            group["lr"] = (
                settings.learning_rate
                * min(1.0, (step + 1) / settings.warmup_steps)
                * min(1.0, 2 * (1 - gone))
            )
        picked = rng.choice(anchors, settings.batch_pairs)
        rows = np.concatenate((picked, neighbours_of(picked, data.doc_ids, settings.reach, rng)))
        ids, mask = (t.to(device) for t in data.batch(rows, tokenizer.pad_id, config.max_tokens))
        with torch.autocast(kind, torch.bfloat16):
            topic = contextual(ids, encoder.tokens(ids), mask).float()
        topic = F.normalize(topic - encoder.centre, dim=-1)
        away = 1 - (topic * image(vectors[rows]).to(device)).sum(1).mean()
        first, second = topic.chunk(2)
        contrast = infonce(first, second, settings.temperature)
        loss = away + settings.contrast_weight * contrast
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss.item()} at step {step}; lower --learning-rate and run again"
            )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for g in optimiser.param_groups for p in g["params"]], 1.0)
        optimiser.step()
        recent.append((away.item(), contrast.item()))
        step += 1
        spent_s += time.perf_counter() - begun

    tensors = {k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in encoder.state_dict().items()}
    save_file(tensors, output / "encoder.safetensors", metadata={"format": "pt"})
    record = {
        "config": encoder.config.to_dict(),
        "topics": asdict(settings),
        "steps": step,
        "held_out": score,
    }
    (output / "topics.json").write_text(json.dumps(record, indent=1) + "\n")
    return {"steps": step, "seconds": round(spent_s), **score}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    defaults = TopicSettings()
    parser = argparse.ArgumentParser(description="Fit mini's topic part to a teacher.", allow_abbrev=False)
    parser.add_argument("--chunks", type=Path, required=True, help="folder of chunk shards (Parquet)")
    parser.add_argument("--teacher", type=Path, required=True, help="folder of a sentence-transformers model")
    parser.add_argument("--init", type=Path, required=True, help="folder of the codec to start from")
    parser.add_argument("--output", type=Path, required=True, help="run folder; a run there is continued")
    parser.add_argument("--layers", type=int, default=2, help="blocks of the contextual encoder")
    parser.add_argument("--minutes", type=float, default=defaults.minutes, help="time of training in all")
    parser.add_argument("--batch-pairs", type=int, default=defaults.batch_pairs)
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    parser.add_argument("--contrast-weight", type=float, default=defaults.contrast_weight)
    parser.add_argument("--limit", type=int, help="use the first chunks only, this many")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="compile the step (needs a C++ compiler)")
    args = parser.parse_args(arguments)
    settings = TopicSettings(
        minutes=args.minutes,
        batch_pairs=args.batch_pairs,
        learning_rate=args.learning_rate,
        contrast_weight=args.contrast_weight,
    )
    summary = fit_topics_to(
        args.chunks,
        args.teacher,
        args.init,
        args.output,
        args.layers,
        settings,
        args.device,
        args.limit,
        args.compile,
    )
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
