"""Trains a writer (`lvm.codec.writer`) for the codec that made the vectors. Plain torch.

    python -m lvm.codec.writer_training --vectors SHARDS --base FOLDER_OR_GGUF --output RUN_DIR --minutes 60

Reads vector shards (Parquet with `doc_id`, `position`, `text`, `vector`). Writes into RUN_DIR `prepared/` (predictions,
computed once), `curve.jsonl` (a line every few minutes: nats per token of held-out texts, throughput), and at every
save `checkpoint.pt` (a second run resumes from it) and the writer's four files, so that a stopped run leaves a writer.

Trains the evidence network (`lvm.codec.evidence`) first, for some minutes; then a low-rank adapter of the language
model and the prefix that it follows. The vector from which a text is to be written is of every kind that a writer
meets: the text's own; blended with noise or another text's; the mean of neighbouring texts'; and mostly, predicted from
the five chunks before by a ridge regression, raw or snapped onto a corpus.

Letters: B batch, D vector length, S prefix positions, T tokens, V token ids, V' ids that may be written.
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
from lvm.codec.training import Ints, hold_out, padded
from lvm.codec.writer import Prefix, Writer, WriterConfig, save_writer
from lvm.devices import pick_device
from lvm.errors import InputError, OutputError, TrainingError
from lvm.ridge import Ridge

CONTEXT = 5
"""Number of preceding chunks that a prediction is made from."""

KINDS = ("own", "blended", "mean", "predicted", "snapped")
"""Kinds of training vectors; see the methods of `TrainingVectors`."""


@dataclass(frozen=True)
class WriterSettings:
    """Hyperparameters; saved with the writer."""

    minutes: float = 60.0
    """Training time of the adapter, earlier parts of a resumed run included."""
    batch: int = 32
    """Chunks per step."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    warmup_steps: int = 40
    """Steps of linear warm-up."""
    decay_share: float = 0.3
    """Last share of the time, in which the learning rate decays linearly to a twentieth."""
    evidence_steps: int = 1200
    """Training steps of the evidence network."""
    evidence_batch: int = 512
    """Chunks per step of the evidence network."""
    shares: tuple[float, float, float, float, float] = (0.15, 0.2, 0.1, 0.35, 0.2)
    """Share of each of KINDS among the vectors."""
    num_words: int = 12_000
    """Words in the evidence network's list."""
    max_tokens: int = 56
    """Maximum tokens of a text, end token included; longer texts are left out."""
    rank: int = 16
    """Rank of the adapter."""
    held_out_share: float = 0.01
    """Share of articles held out for the score (at least 20 articles)."""
    seed: int = 5
    """Seed of initial weights, batches and noise."""

    def __post_init__(self) -> None:
        if self.minutes <= 0:
            raise InputError(f"minutes must be above 0, got {self.minutes}")
        if abs(sum(self.shares) - 1) > 1e-6 or min(self.shares) < 0 or len(self.shares) != len(KINDS):
            raise InputError(f"shares are {self.shares}; expected {len(KINDS)} of them that add up to 1")


class Corpus:
    """Vectors and texts in article order, and a prediction of each vector from the preceding ones."""

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
        """Read the vector shards of a directory. Raises InputError when there are none, or no manifest names their
        codec.

        limit: read no more shards once there are this many chunks; None for all.
        """
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

    def split(self, share: float, seed: int) -> tuple[Ints, Ints]:
        """The rows with a full context before them, split as in `hold_out`."""
        rows = np.flatnonzero(self.docs[CONTEXT:] == self.docs[:-CONTEXT]) + CONTEXT
        return hold_out(rows, self.docs, share, seed)

    def contexts(self, rows: Ints) -> Tensor:
        """(B, CONTEXT, D) float32: the vectors before each row."""
        before = rows[:, None] + np.arange(-CONTEXT, 0)[None]
        return torch.from_numpy(self.vectors[before].astype(np.float32))

    def predict(self, train: Ints, held: Ints, path: Path, max_rows: int = 60_000) -> None:
        """Set `predicted`, from the file `path` if it exists, else to a ridge regression's predictions (unit vectors).

        Each half of the training articles is predicted by a regression fitted on at most `max_rows` rows of the other
        half, so that the errors are those on new text.
        """
        if path.exists():
            self.predicted = np.load(path, mmap_mode="r")
            return
        half = self.docs % 2 == 0
        out = np.zeros_like(self.vectors)
        for fitted in (True, False):
            rows = train[half[train] == fitted]
            sample = rows[np.linspace(0, len(rows) - 1, min(max_rows, len(rows))).astype(np.int64)]
            targets = torch.from_numpy(self.vectors[sample].astype(np.float32))
            weight, bias = Ridge(self.contexts(sample).flatten(1), targets).solve(1.0)
            others = np.concatenate((train[half[train] != fitted], held if fitted else held[:0]))
            for part in np.array_split(others, max(1, len(others) // 8192)):
                predicted = F.normalize(self.contexts(part).flatten(1) @ weight + bias, dim=1)
                out[part] = predicted.numpy().astype(np.float16)
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            np.save(file, out)
        os.replace(temporary, path)
        self.predicted = out


class TrainingVectors:
    """Vectors of each of KINDS for rows of a corpus, float32 unit vectors (B, D)."""

    def __init__(self, corpus: Corpus, train: Ints, settings: WriterSettings) -> None:
        self.corpus, self.settings = corpus, settings
        rng = np.random.default_rng(settings.seed)
        pool = np.sort(rng.choice(train, min(len(train), 24_000), replace=False))
        self.pool = torch.from_numpy(corpus.vectors[pool].astype(np.float32))
        self.pool_docs = torch.from_numpy(corpus.docs[pool])
        self.mean = self.pool.mean(0)

    def own(self, rows: Ints) -> Tensor:
        """The texts' own vectors."""
        return torch.from_numpy(self.corpus.vectors[rows].astype(np.float32))

    def predicted(self, rows: Ints) -> Tensor:
        """Predictions from the preceding vectors."""
        return torch.from_numpy(self.corpus.predicted[rows].astype(np.float32))

    def blended(self, rows: Ints, rng: np.random.Generator) -> Tensor:
        """Own vectors with a uniform random share of noise or of another text's vector, relative to the corpus mean."""
        own = self.own(rows) - self.mean
        alpha = torch.from_numpy(rng.uniform(0, 1, (len(rows), 1)).astype(np.float32))
        noise = torch.from_numpy(rng.standard_normal(own.shape, dtype=np.float32))
        other = self.pool[torch.from_numpy(rng.integers(0, len(self.pool), len(rows)))] - self.mean
        is_noise = torch.from_numpy(rng.random((len(rows), 1)) < 0.5)
        added = F.normalize(torch.where(is_noise, noise, other), dim=1) * own.norm(dim=1, keepdim=True)
        return F.normalize(self.mean + (1 - alpha).sqrt() * own + alpha.sqrt() * added, dim=1)

    def means(self, rows: Ints, rng: np.random.Generator) -> Tensor:
        """Means of the text's vector and the one to four before it."""
        vectors = torch.cat((self.corpus.contexts(rows), self.own(rows)[:, None]), dim=1)
        first = torch.from_numpy(rng.integers(1, CONTEXT, len(rows)))
        kept = (torch.arange(CONTEXT + 1)[None] >= first[:, None]).float()
        return F.normalize((vectors * kept[..., None]).sum(1), dim=1)

    def snapped(self, rows: Ints) -> Tensor:
        """Predictions snapped onto the corpus: 0.75 of the weighted mean of the 16 nearest vectors of other articles,
        0.15 of the preceding vector and 0.10 of the mean of the context."""
        contexts = self.corpus.contexts(rows)
        scores = self.predicted(rows) @ self.pool.T
        scores[torch.from_numpy(self.corpus.docs[rows])[:, None] == self.pool_docs[None]] = -1
        near, at = scores.topk(16, dim=1)
        snap = F.normalize((near.clamp_min(0)[..., None] * self.pool[at]).sum(1), dim=1)
        mean = F.normalize(contexts.mean(1), dim=1)
        return F.normalize(0.75 * snap + 0.15 * contexts[:, -1] + 0.10 * mean, dim=1)

    def mixed(self, rows: Ints, rng: np.random.Generator) -> Tensor:
        """Vectors of a random kind each, by the settings' shares."""
        kind = rng.choice(len(KINDS), len(rows), p=self.settings.shares)
        out = self.own(rows)
        draws = (lambda r: self.blended(r, rng), lambda r: self.means(r, rng), self.predicted, self.snapped)
        for number, draw in enumerate(draws, 1):
            chosen = np.flatnonzero(kind == number)
            if len(chosen):
                out[torch.from_numpy(chosen)] = draw(rows[chosen])
        return out


class Tokens:
    """Token ids of all texts of a corpus, each with the end token, in one flat array."""

    def __init__(self, texts: Sequence[str], base: Llama, end_id: int) -> None:
        rows: list[npt.NDArray[np.int32]] = []
        for low in range(0, len(texts), 10_000):
            for encoding in base.tokenizer.encode_batch_fast(list(texts[low : low + 10_000])):
                rows.append(np.asarray([*encoding.ids, end_id], np.int32))
        self.lengths = np.fromiter((len(r) for r in rows), np.int64, len(rows))
        self.ids = np.concatenate(rows)
        self.starts = np.cumsum(self.lengths) - self.lengths

    def batch(self, rows: Ints) -> tuple[Tensor, Tensor]:
        """Token ids of rows, padded with 0, and their mask, as in `padded`."""
        return padded(self.ids, self.starts[rows], self.lengths[rows], 0)


def kept_ids(tokens: Tokens, vocabulary_size: int, end_id: int, least: int = 3) -> Tensor:
    """Ids that occur at least `least` times in the texts, and the end token, (V',) int64 ascending; padded with the
    next commonest to a multiple of 128."""
    counts = np.bincount(tokens.ids, minlength=vocabulary_size)
    counts[end_id] = counts.max() + 1
    number = int((counts >= least).sum())
    number = min(vocabulary_size, -(-number // 128) * 128)
    return torch.from_numpy(np.sort(np.argsort(-counts, kind="stable")[:number]))


def fit_evidence(
    evidence: Evidence, counts: WordCounts, vectors: TrainingVectors, rows: Ints, settings: WriterSettings
) -> float:
    """Train the evidence network in place; returns the mean loss of the last 50 steps, nats per word."""
    device = evidence.centre.device
    evidence.describe(vectors.pool.to(device), counts.usual().to(device))
    optimiser = torch.optim.AdamW(evidence.parameters(), lr=2e-3, weight_decay=0.01)
    rng = np.random.default_rng(settings.seed + 1)
    recent: list[float] = []
    started = time.perf_counter()
    for step in range(settings.evidence_steps):
        picked = rng.choice(rows, settings.evidence_batch)
        targets = counts.targets(torch.from_numpy(picked)).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            logs = evidence(vectors.mixed(picked, rng).to(device))
        loss = -(targets * logs).sum() / targets.sum().clamp_min(1)
        warmup, left = min(1, (step + 1) / 50), 1 - step / settings.evidence_steps
        optimiser.param_groups[0]["lr"] = 2e-3 * warmup * left
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        recent = [*recent[-49:], loss.item()]
        if step % 200 == 199:
            spent = time.perf_counter() - started
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
    """Negative log-likelihoods of the texts' tokens given the vectors (B, D), nats, one per real token; float32.

    ids, mask: (B, T). places: (V,) int64, the index of each token id among the kept ids, -1 if it is not kept; such
    tokens are left out.
    """
    table = base.weights["embed_tokens.weight"]
    before = prefix(vectors).to(table.dtype)
    x = torch.cat((before, F.embedding(ids[:, :-1], table)), dim=1)
    states = forward(base, adapter, x)[
        :, before.shape[1] - 1 :
    ]  # the last prefix position predicts the first token
    targets = places[ids]
    real = mask & (targets >= 0)
    logits = F.linear(states[real], table[prefix.kept])
    return F.cross_entropy(logits.float(), targets[real], reduction="none")


def usual_likelihood(base: Base, texts: Sequence[str], device: str) -> dict[str, float]:
    """Mean log-probability per character, nats, that 98 % and 75 % of the texts reach under the language model."""
    runner = LlamaRunner(base.model, "float32", device=torch.device(device))
    logs = log_probs(runner, base.model.tokenizer, texts)
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
    """Train for `settings.minutes`, resuming from `output/checkpoint.pt` if it exists.

    base_path: as in `load_base`. limit: as in `Corpus.read`. on_score: called with each line of the curve. init: folder
    of a writer from which a new run starts, for any codec with vectors of this length. Returns the last held-out score
    with steps, chunks and seconds. Raises InputError on unusable vectors, language model or `init`, OutputError when
    the existing run is of another codec or language model, and TrainingError when the loss is not finite.
    """
    output.mkdir(parents=True, exist_ok=True)
    prepared = output / "prepared"
    prepared.mkdir(exist_ok=True)
    base = load_base(base_path)
    corpus = Corpus.read(vectors, limit)
    train, held = corpus.split(settings.held_out_share, settings.seed)
    print(f"{len(corpus):,} chunks, {len(train):,} to train on, {len(held):,} held out", flush=True)
    corpus.predict(train, held, prepared / "predicted.npy")
    drawn = TrainingVectors(corpus, train, settings)
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
        loaded = Writer.parts(output if state is not None else init, base, None)  # type: ignore[arg-type]
        prefix, adapter = loaded.prefix, loaded.adapter
        if prefix.config.dim != corpus.identity.dim:
            raise InputError(
                f"--init is for {prefix.config.dim}-d vectors, got {corpus.identity.dim}-d; choose another"
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
        fit_evidence(prefix.evidence, counts, drawn, train, settings)
        del counts
    prefix.evidence.requires_grad_(False)
    trained = (adapter.parameters(), (p for p in prefix.parameters() if p.requires_grad))
    groups = [{"params": list(parameters), "weight_decay": 0.0} for parameters in trained]
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
    scored = held[np.linspace(0, len(held) - 1, min(96, len(held))).astype(np.int64)]
    given = {
        "own": drawn.own(scored),
        "predicted": drawn.predicted(scored),
        "snapped": drawn.snapped(scored),
        "nothing": F.normalize(drawn.mean, dim=0).expand(len(scored), -1),
    }
    queue: list[Ints] = []
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
        made_of = {"identity": corpus.identity.digest, "base": base.sha256}
        progress = {"step": step, "spent_s": spent_s, "seen": seen}
        parts: dict[str, Any] = {"prefix": prefix, "adapter": adapter, "optimiser": optimiser}
        states = {name: part.state_dict() for name, part in parts.items()}
        temporary = checkpoint.with_suffix(".tmp")
        torch.save(made_of | progress | states, temporary)
        os.replace(temporary, checkpoint)

    while True:
        done = spent_s >= settings.minutes * 60
        # --- score, log and save
        if done or spent_s - last_score >= score_every_s:
            with torch.inference_mode():
                ids, mask = (t.to(device) for t in tokens.batch(scored))
                for kind, some in given.items():
                    batches = zip(some.to(device).split(32), ids.split(32), mask.split(32), strict=True)
                    nats = [token_nats(base.model, adapter, prefix, *batch, places) for batch in batches]
                    score[kind] = float(torch.cat(nats).mean())
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
                texts = [corpus.texts[i] for i in held[:: max(1, len(held) // 600)]]
                likely = usual_likelihood(base, texts, device)
            recent, last_score = [], spent_s
            save()
        if done:
            break
        # --- step
        started = time.perf_counter()
        if not queue:
            # Texts of similar length in one batch need little padding.
            many = rng.choice(train, 8 * settings.batch)
            many = many[np.argsort(tokens.lengths[many], kind="stable")]
            queue = [many[i : i + settings.batch] for i in range(0, len(many), settings.batch)]
            rng.shuffle(queue)
        rows = queue.pop()
        left = 1 - spent_s / (settings.minutes * 60)
        warmup, decay = min(1.0, (step + 1) / settings.warmup_steps), min(1.0, left / settings.decay_share)
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * (warmup * max(0.05, decay))
        ids, mask = (t.to(device) for t in tokens.batch(rows))
        mixed = drawn.mixed(rows, rng).to(device)
        loss = token_nats(base.model, adapter, prefix, mixed, ids, mask, places).mean()
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the writer's loss is {loss.item()} at step {step}; expected a finite number. Lower --learning-rate "
                f"and run again; it resumes from {checkpoint}"
            )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for g in optimiser.param_groups for p in g["params"]], 1.0)
        optimiser.step()
        recent.append(loss.item())
        step += 1
        seen += len(rows)
        spent_s += time.perf_counter() - started
    return {"steps": step, "chunks_seen": seen, "seconds": round(spent_s), **score}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    defaults = WriterSettings()
    parser = argparse.ArgumentParser(description="Fit a writer for a codec's vectors.", allow_abbrev=False)
    parser.add_argument(
        "--vectors", type=Path, required=True, help="folder of vector shards (`latent encode`)"
    )
    parser.add_argument(
        "--base", type=Path, help="language model: a folder or .gguf file; default: the installed one"
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
        args.minutes, args.batch, args.learning_rate, evidence_steps=args.evidence_steps
    )
    score_every_s = args.score_every * 60
    options = (args.device, args.limit, args.init, score_every_s)
    print(json.dumps(fit_writer(args.vectors, args.base, args.output, settings, *options)))


if __name__ == "__main__":
    main()
