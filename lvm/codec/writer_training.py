"""Fits a writer's adapter for whatever codec made the vectors. Plain torch.

    python -m lvm.codec.writer_training --vectors SHARDS --base FOLDER_OR_GGUF --output RUN_DIR --minutes 60

Reads vector shards (Parquet with `doc_id`, `position`, `text`, `vector`). Writes into RUN_DIR `prepared/`
(made once), `checkpoint.pt` (a run there is continued), `curve.jsonl` (a line every few minutes: nats per token
of held-out texts, and chunks per second), `samples.txt`, and `writer.safetensors`, `evidence.safetensors`,
`words.txt` and `writer.json` at every save, so that a run that is stopped leaves a writer.

First the evidence network (`lvm.codec.evidence`), some minutes; then a low-rank adapter of the language model,
and the positions that put the vector before the text. The vectors a text is written from are drawn of every
kind that a writer meets: the text's own; blends with noise and with other texts; means of neighbouring texts;
and, the most, predictions of a ridge regression from the five chunks before, raw or snapped onto a corpus,
with the true next text as target.

Letters: N chunks, B batch, D vector length, S positions before the text, T tokens, W the language model's width.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor

from lvm.codec.evidence import Evidence, WordCounts, choose_words
from lvm.codec.identity import CodecIdentity
from lvm.codec.language_model import Base, load_base, log_probs
from lvm.codec.llama import Adapter, Llama, LlamaRunner, forward
from lvm.codec.writer import Prefix, Writer, WriterConfig, save_writer
from lvm.devices import pick_device
from lvm.errors import InputError, OutputError, TrainingError
from lvm.ridge import Ridge

CONTEXT = 5
"""Chunks a prediction is made from."""

KINDS = ("own", "blended", "mean", "predicted", "snapped")


@dataclass(frozen=True)
class WriterSettings:
    """How a writer is fitted; saved with it."""

    minutes: float = 60.0
    """Time of training the adapter, all resumed parts together."""
    batch: int = 32
    """Chunks a step."""
    learning_rate: float = 1e-3
    """Peak of AdamW's step size."""
    warmup_steps: int = 40
    """Steps of linear rise."""
    decay_share: float = 0.3
    """Last share of the time in which the step size falls to a twentieth."""
    evidence_steps: int = 1200
    """Steps of the evidence network, of `evidence_batch` chunks."""
    evidence_batch: int = 512
    """Chunks a step of the evidence network."""
    shares: tuple[float, float, float, float, float] = (0.15, 0.2, 0.1, 0.35, 0.2)
    """Share of each of KINDS among the vectors."""
    num_words: int = 12_000
    """Words the evidence is drawn from."""
    max_tokens: int = 56
    """Tokens of a text, the end token included; longer texts are left out."""
    rank: int = 16
    """Rank of the adapter."""
    held_out_share: float = 0.01
    """Share of articles kept for the curve (at least 20)."""
    seed: int = 5
    """Seed of batches, noise and new weights."""

    def __post_init__(self) -> None:
        if self.minutes <= 0:
            raise InputError(f"minutes must be above 0, got {self.minutes}")
        if abs(sum(self.shares) - 1) > 1e-6 or min(self.shares) < 0 or len(self.shares) != len(KINDS):
            raise InputError(f"shares are {self.shares}; expected {len(KINDS)} of them that add up to 1")


class Corpus:
    """Vectors and texts in article order, with what a regression predicts for each from the chunks before."""

    def __init__(
        self,
        identity: CodecIdentity,
        vectors: npt.NDArray[np.float16],
        docs: npt.NDArray[np.int32],
        texts: list[str],
    ) -> None:
        self.identity, self.vectors, self.docs, self.texts = identity, vectors, docs, texts
        self.predicted: npt.NDArray[np.float16] = np.zeros((0, vectors.shape[1]), np.float16)

    def __len__(self) -> int:
        return len(self.texts)

    @classmethod
    def read(cls, directory: Path, limit: int | None) -> "Corpus":
        """All shards of a folder. Raises InputError where there are none, or no identity beside them."""
        files = sorted(directory.glob("*.parquet"))
        if not files:
            raise InputError(
                f"no *.parquet in {directory}; expected vector shards, make them with `latent encode`"
            )
        try:
            record = json.loads((directory / "manifest.json").read_text())["codec"]
            identity = CodecIdentity.from_dict(record)
        except (OSError, ValueError, KeyError, TypeError) as err:
            raise InputError(f"{directory / 'manifest.json'} names no codec ({err}); encode again") from err
        tables, rows = [], 0
        for file in files:
            tables.append(pq.read_table(file, columns=["doc_id", "position", "text", "vector"]))
            rows += len(tables[-1])
            if limit is not None and rows >= limit:
                break
        table = pa.concat_tables(tables).sort_by([("doc_id", "ascending"), ("position", "ascending")])
        column = table.column("vector").combine_chunks()
        vectors = column.flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1).astype(np.float16)
        return cls(identity, vectors, table.column("doc_id").to_numpy(), table.column("text").to_pylist())

    def split(self, share: float, seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Rows with a whole context before them, of training and of held-out articles; split by article."""
        docs = np.unique(self.docs)
        if len(docs) < 40:
            raise InputError(f"expected chunks of at least 40 articles to hold some out, got {len(docs)}")
        np.random.default_rng(seed).shuffle(docs)
        held = docs[: max(20, int(len(docs) * share))]
        rows = np.flatnonzero(self.docs[CONTEXT:] == self.docs[:-CONTEXT]) + CONTEXT
        is_held = np.isin(self.docs[rows], held)
        return rows[~is_held], rows[is_held]

    def contexts(self, rows: npt.NDArray[np.int64]) -> Tensor:
        """(B, CONTEXT, D) float32: the chunks before each row."""
        before = rows[:, None] + np.arange(-CONTEXT, 0)[None]
        return torch.from_numpy(self.vectors[before].astype(np.float32))

    def predict(
        self, train: npt.NDArray[np.int64], held: npt.NDArray[np.int64], path: Path, most: int = 60_000
    ) -> None:
        """Fill `predicted`, from `path` where it is there: unit vectors a ridge regression gives for each row.

        Two halves of the training articles predict each other, so that a prediction is as far off as on new text.
        """
        if path.exists():
            self.predicted = np.load(path, mmap_mode="r")
            return
        half = self.docs % 2 == 0
        out = np.zeros_like(self.vectors)
        for fitted in (True, False):
            rows = train[half[train] == fitted]
            some = rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(np.int64)]
            truth = torch.from_numpy(self.vectors[some].astype(np.float32))
            weight, bias = Ridge(self.contexts(some).flatten(1), truth).solve(1.0)
            others = np.concatenate((train[half[train] != fitted], held if fitted else held[:0]))
            for part in np.array_split(others, max(1, len(others) // 8192)):
                made = F.normalize(self.contexts(part).flatten(1) @ weight + bias, dim=1)
                out[part] = made.numpy().astype(np.float16)
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            np.save(file, out)
        os.replace(temporary, path)
        self.predicted = out


class Drawn:
    """Vectors of every kind for rows of a corpus."""

    def __init__(self, corpus: Corpus, train: npt.NDArray[np.int64], settings: WriterSettings) -> None:
        self.corpus, self.settings = corpus, settings
        rng = np.random.default_rng(settings.seed)
        pool = np.sort(rng.choice(train, min(len(train), 24_000), replace=False))
        self.pool = torch.from_numpy(corpus.vectors[pool].astype(np.float32))
        self.pool_docs = torch.from_numpy(corpus.docs[pool])
        self.mean = self.pool.mean(0)

    def own(self, rows: npt.NDArray[np.int64]) -> Tensor:
        """(B, D) float32: the texts' own vectors."""
        return torch.from_numpy(self.corpus.vectors[rows].astype(np.float32))

    def predicted(self, rows: npt.NDArray[np.int64]) -> Tensor:
        """(B, D) float32: predictions."""
        return torch.from_numpy(self.corpus.predicted[rows].astype(np.float32))

    def blended(self, rows: npt.NDArray[np.int64], rng: np.random.Generator) -> Tensor:
        """Own vectors with a share alpha, uniform, of noise or of another text's, in coordinates about the mean."""
        own = self.own(rows) - self.mean
        alpha = torch.from_numpy(rng.uniform(0, 1, (len(rows), 1)).astype(np.float32))
        noise = torch.from_numpy(rng.standard_normal(own.shape, dtype=np.float32))
        other = self.pool[torch.from_numpy(rng.integers(0, len(self.pool), len(rows)))] - self.mean
        is_noise = torch.from_numpy(rng.random((len(rows), 1)) < 0.5)
        added = F.normalize(torch.where(is_noise, noise, other), dim=1) * own.norm(dim=1, keepdim=True)
        return F.normalize(self.mean + (1 - alpha).sqrt() * own + alpha.sqrt() * added, dim=1)

    def means(self, rows: npt.NDArray[np.int64], rng: np.random.Generator) -> Tensor:
        """Means of the text's vector and of those of one to four chunks before it."""
        whole = torch.cat((self.corpus.contexts(rows), self.own(rows)[:, None]), dim=1)
        first = torch.from_numpy(rng.integers(1, CONTEXT, len(rows)))
        kept = (torch.arange(CONTEXT + 1)[None] >= first[:, None]).float()
        return F.normalize((whole * kept[..., None]).sum(1), dim=1)

    def snapped(self, rows: npt.NDArray[np.int64]) -> Tensor:
        """Predictions moved onto the corpus: 75 % of the weighted mean of the 16 nearest of other articles, 15
        % of the last vector before and 10 % of the mean of five."""
        made, contexts = self.predicted(rows), self.corpus.contexts(rows)
        scores = made @ self.pool.T
        scores[torch.from_numpy(self.corpus.docs[rows])[:, None] == self.pool_docs[None]] = -1
        near, at = scores.topk(16, dim=1)
        snap = F.normalize((near.clamp_min(0)[..., None] * self.pool[at]).sum(1), dim=1)
        return F.normalize(
            0.75 * snap + 0.15 * contexts[:, -1] + 0.10 * F.normalize(contexts.mean(1), dim=1), dim=1
        )

    def mixed(self, rows: npt.NDArray[np.int64], rng: np.random.Generator) -> Tensor:
        """(B, D) float32 unit vectors, of each kind by its share."""
        kind = rng.choice(len(KINDS), len(rows), p=self.settings.shares)
        out = self.own(rows)
        for number, draw in enumerate(
            (None, lambda r: self.blended(r, rng), lambda r: self.means(r, rng), self.predicted, self.snapped)
        ):
            chosen = np.flatnonzero(kind == number)
            if draw is not None and len(chosen):
                out[torch.from_numpy(chosen)] = draw(rows[chosen])
        return out


class Tokens:
    """Token ids of all texts of a corpus, without and with the end token, in one flat array."""

    def __init__(self, texts: Sequence[str], base: Llama, end_id: int) -> None:
        rows: list[npt.NDArray[np.int32]] = []
        for low in range(0, len(texts), 10_000):
            for encoding in base.tokenizer.encode_batch_fast(list(texts[low : low + 10_000])):
                rows.append(np.asarray([*encoding.ids, end_id], np.int32))
        self.lengths = np.fromiter((len(r) for r in rows), np.int64, len(rows))
        self.ids = np.concatenate(rows)
        self.starts = np.cumsum(self.lengths) - self.lengths

    def batch(self, rows: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Ids (B, T) int64 padded with 0, and the mask (B, T) of real places."""
        lengths = self.lengths[rows]
        place = np.arange(lengths.max())[None]
        mask = place < lengths[:, None]
        flat = np.minimum(self.starts[rows][:, None] + place, len(self.ids) - 1)
        return torch.from_numpy(np.where(mask, self.ids[flat], 0).astype(np.int64)), torch.from_numpy(mask)


def kept_ids(tokens: Tokens, vocabulary_size: int, end_id: int, least: int = 3) -> Tensor:
    """Ids that occur at least so often in the texts, and the end; (V',) int64 ascending, filled up to a
    multiple of 128 with the commonest of the rest."""
    counts = np.bincount(tokens.ids, minlength=vocabulary_size)
    counts[end_id] = counts.max() + 1
    number = int((counts >= least).sum())
    number = min(vocabulary_size, -(-number // 128) * 128)
    return torch.from_numpy(np.sort(np.argsort(-counts, kind="stable")[:number]))


def fit_evidence(
    evidence: Evidence,
    corpus: Corpus,
    counts: WordCounts,
    drawn: Drawn,
    rows: npt.NDArray[np.int64],
    settings: WriterSettings,
) -> float:
    """Train the evidence network in place; the mean loss of the last 50 steps, nats per word."""
    device = evidence.centre.device
    evidence.describe(drawn.pool.to(device), counts.usual().to(device))
    optimiser = torch.optim.AdamW(evidence.parameters(), lr=2e-3, weight_decay=0.01)
    rng = np.random.default_rng(settings.seed + 1)
    recent: list[float] = []
    begun = time.perf_counter()
    for step in range(settings.evidence_steps):
        picked = rng.choice(rows, settings.evidence_batch)
        wanted = counts.targets(torch.from_numpy(picked)).to(device)
        kind = torch.device(device).type
        with torch.autocast(kind, torch.bfloat16):
            logs = evidence(drawn.mixed(picked, rng).to(device))
        loss = -(wanted * logs).sum() / wanted.sum().clamp_min(1)
        optimiser.param_groups[0]["lr"] = (
            2e-3 * min(1, (step + 1) / 50) * (1 - step / settings.evidence_steps)
        )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        recent = [*recent[-49:], loss.item()]
        if step % 200 == 199:
            spent = time.perf_counter() - begun
            print(
                f"evidence: step {step + 1}, {np.mean(recent):.3f} nats per word, {spent:.0f} s", flush=True
            )
    return float(np.mean(recent))


def token_nats(
    base: Llama,
    adapter: Adapter | None,
    prefix: Prefix,
    vectors: Tensor,
    ids: Tensor,
    mask: Tensor,
    places: Tensor,
) -> Tensor:
    """Nats of the texts' tokens given the vectors, one a real token, float32.

    ids, mask (B, T); places: (V,) int64, each token id's place in the kept table, -1 where it is not kept. A
    token that is not kept is no target.
    """
    dtype = base.weights["embed_tokens.weight"].dtype
    table = base.weights["embed_tokens.weight"]
    before = prefix(vectors).to(dtype)
    S = before.shape[1]
    x = torch.cat((before, F.embedding(ids[:, :-1], table)), dim=1)
    states = forward(base, adapter, x)[:, S - 1 :]  # the last place before the text tells its first token
    targets = places[ids]
    real = mask & (targets >= 0)
    logits = F.linear(states[real], table[prefix.kept])
    return F.cross_entropy(logits.float(), targets[real], reduction="none")


def usual_likelihood(base: Base, texts: Sequence[str], device: str) -> dict[str, float]:
    """Mean log-probability per character, nats, that 98 % and 75 % of real texts have under the language model."""
    logs = log_probs(
        LlamaRunner(base.model, "float32", device=torch.device(device)), base.model.tokenizer, texts
    )
    least, usual = np.quantile(logs, (0.02, 0.25)).tolist()
    return {"least_log_prob": round(least, 3), "usual_log_prob": round(usual, 3)}


def fit_writer(
    vectors: Path,
    base_path: Path | None,
    output: Path,
    settings: WriterSettings,
    device: str = "cpu",
    limit: int | None = None,
    init: Path | None = None,
    score_every_s: float = 180.0,
    on_score: Callable[[dict[str, Any]], object] | None = None,
) -> dict[str, Any]:
    """Train until `settings.minutes` are spent, going on from `output/checkpoint.pt`; the last held-out score.

    init: folder of a writer to start from, of whatever codec with vectors of this length. Raises InputError and
    OutputError where something does not fit, TrainingError when the loss is no number.
    """
    output.mkdir(parents=True, exist_ok=True)
    prepared = output / "prepared"
    prepared.mkdir(exist_ok=True)
    base = load_base(base_path)
    corpus = Corpus.read(vectors, limit)
    train, held = corpus.split(settings.held_out_share, settings.seed)
    print(f"{len(corpus):,} chunks, {len(train):,} to train on, {len(held):,} held out", flush=True)
    corpus.predict(train, held, prepared / "predicted.npy")
    drawn = Drawn(corpus, train, settings)
    end_id = base.end_id
    tokens = Tokens(corpus.texts, base.model, end_id)
    fits = tokens.lengths <= settings.max_tokens
    train, held = train[fits[train]], held[fits[held]]

    torch.manual_seed(settings.seed)
    checkpoint = output / "checkpoint.pt"
    state: dict[str, Any] | None = None
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        if state["identity"] != corpus.identity.digest or state["base"] != base.sha256:
            raise OutputError(f"{checkpoint} is of another codec or language model; choose another --output")
    if state is not None or init is not None:
        started = Writer.parts(output if state is not None else init, base, None)  # type: ignore[arg-type]
        prefix, adapter = started.prefix, started.adapter
        if prefix.evidence.centre.shape[0] != corpus.identity.dim:
            raise InputError(
                f"--init is of {prefix.evidence.centre.shape[0]}-d vectors, got {corpus.identity.dim}-d"
            )
    else:
        words = choose_words((corpus.texts[i] for i in train), settings.num_words)
        kept = kept_ids(tokens, base.model.config.vocab_size, end_id)
        config = WriterConfig(dim=corpus.identity.dim, num_words=len(words), rank=settings.rank)
        prefix = Prefix(config, base.model, words, kept)
        adapter = Adapter(base.model.config, settings.rank)
    prefix.to(device)
    adapter.to(device)
    base.model.weights = {k: v.to(device) for k, v in base.model.weights.items()}
    if state is None:
        counts = WordCounts(corpus.texts, prefix.words)
        fit_evidence(prefix.evidence, corpus, counts, drawn, train, settings)
        del counts
    prefix.evidence.requires_grad_(False)
    groups = [
        {"params": list(adapter.parameters()), "weight_decay": 0.0},
        {"params": [p for p in prefix.parameters() if p.requires_grad], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98))
    step, spent_s, seen = 0, 0.0, 0
    if state is not None:
        prefix.load_state_dict(state["prefix"])
        adapter.load_state_dict(state["adapter"])
        optimiser.load_state_dict(state["optimiser"])
        step, spent_s, seen = state["step"], state["spent_s"], state["seen"]
        print(f"resuming at step {step}, after {spent_s / 60:.1f} minutes", flush=True)
    places = torch.full((base.model.config.vocab_size,), -1)
    places[prefix.kept.cpu()] = torch.arange(len(prefix.kept))
    places = places.to(device)
    rng = np.random.default_rng((settings.seed, step))
    asked = held[np.linspace(0, len(held) - 1, min(96, len(held))).astype(np.int64)]
    given = {
        "own": drawn.own(asked),
        "predicted": drawn.predicted(asked),
        "snapped": drawn.snapped(asked),
        "nothing": F.normalize(drawn.mean, dim=0).expand(len(asked), -1),
    }
    config = prefix.config
    queue: list[npt.NDArray[np.int64]] = []
    recent: list[float] = []
    score: dict[str, float] = {}
    likely: dict[str, float] = {}
    last_score = spent_s

    def save() -> None:
        record = {
            "training": asdict(settings),
            "steps": step,
            "chunks_seen": seen,
            "minutes": round(spent_s / 60, 1),
            "held_out": score,
            **likely,
        }
        save_writer(output, prefix, adapter, corpus.identity, base, record)
        temporary = checkpoint.with_suffix(".tmp")
        torch.save(
            {
                "identity": corpus.identity.digest,
                "base": base.sha256,
                "prefix": prefix.state_dict(),
                "adapter": adapter.state_dict(),
                "optimiser": optimiser.state_dict(),
                "step": step,
                "spent_s": spent_s,
                "seen": seen,
            },
            temporary,
        )
        os.replace(temporary, checkpoint)

    while True:
        done = spent_s >= settings.minutes * 60
        # --- score, log and save
        if done or spent_s - last_score >= score_every_s:
            with torch.inference_mode():
                ids, mask = (t.to(device) for t in tokens.batch(asked))
                for kind, some in given.items():
                    parts = [
                        token_nats(
                            base.model,
                            adapter,
                            prefix,
                            some[i : i + 32].to(device),
                            ids[i : i + 32],
                            mask[i : i + 32],
                            places,
                        )
                        for i in range(0, len(asked), 32)
                    ]
                    score[kind] = float(torch.cat(parts).mean())
            line = {
                "step": step,
                "minutes": round(spent_s / 60, 2),
                "chunks_seen": seen,
                "chunks_per_s": round(seen / max(spent_s, 1e-9), 1),
                "train_nats": round(float(np.mean(recent)), 4) if recent else None,
                **{k: round(v, 4) for k, v in score.items()},
            }
            with (output / "curve.jsonl").open("a") as curve:
                curve.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
            if on_score is not None:
                on_score({k: v for k, v in line.items() if v is not None})
            if done:
                likely = usual_likelihood(
                    base, [corpus.texts[i] for i in held[:: max(1, len(held) // 600)]], device
                )
            recent, last_score = [], spent_s
            save()
        # --- stop
        if done:
            break
        # --- step
        begun = time.perf_counter()
        if not queue:
            # Texts of like length together: a batch holds little padding.
            many = rng.choice(train, 8 * settings.batch)
            many = many[np.argsort(tokens.lengths[many], kind="stable")]
            queue = [many[i : i + settings.batch] for i in range(0, len(many), settings.batch)]
            rng.shuffle(queue)
        rows = queue.pop()
        gone = spent_s / (settings.minutes * 60)
        rate = min(1.0, (step + 1) / settings.warmup_steps) * max(
            0.05, min(1.0, (1 - gone) / settings.decay_share)
        )
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * rate
        ids, mask = (t.to(device) for t in tokens.batch(rows))
        loss = token_nats(
            base.model, adapter, prefix, drawn.mixed(rows, rng).to(device), ids, mask, places
        ).mean()
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the writer's loss is {loss.item()} at step {step}; lower --learning-rate and run again, it goes on "
                f"from {checkpoint}"
            )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for g in optimiser.param_groups for p in g["params"]], 1.0)
        optimiser.step()
        recent.append(loss.item())
        step += 1
        seen += len(rows)
        spent_s += time.perf_counter() - begun
    return {"steps": step, "chunks_seen": seen, "seconds": round(spent_s), **score}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    defaults = WriterSettings()
    parser = argparse.ArgumentParser(description="Fit a writer for a codec's vectors.", allow_abbrev=False)
    parser.add_argument(
        "--vectors", type=Path, required=True, help="folder of vector shards (`latent encode`)"
    )
    parser.add_argument(
        "--base", type=Path, help="language model: a folder or .gguf file; default: as in `load_base`"
    )
    parser.add_argument("--output", type=Path, required=True, help="run folder; an existing run is resumed")
    parser.add_argument("--init", type=Path, help="folder of a writer to start from")
    parser.add_argument("--minutes", type=float, default=defaults.minutes, help="total training time")
    parser.add_argument("--batch", type=int, default=defaults.batch)
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    parser.add_argument("--evidence-steps", type=int, default=defaults.evidence_steps)
    parser.add_argument("--limit", type=int, help="use only the first shards, up to this many chunks")
    parser.add_argument("--device", default=str(pick_device()))
    parser.add_argument("--score-every", type=float, default=3.0, help="minutes between held-out scores")
    args = parser.parse_args(arguments)
    settings = WriterSettings(
        minutes=args.minutes,
        batch=args.batch,
        learning_rate=args.learning_rate,
        evidence_steps=args.evidence_steps,
    )
    summary = fit_writer(
        args.vectors,
        args.base,
        args.output,
        settings,
        args.device,
        args.limit,
        args.init,
        args.score_every * 60,
    )
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
