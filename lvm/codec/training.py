"""Trains the `mini` codec, encoder and hypothesizer together, on chunks. Plain torch.

    python -m lvm.codec.training --chunks CHUNKS_DIR --tokenizer tokenizer.json --output RUN_DIR --minutes 60
    python -m lvm.codec.training ... --init CODEC_DIR                     start from a codec's weights
    python -m lvm.codec.training ... --init CODEC_DIR --freeze-encoder    train only the hypothesizer

Reads chunk shards (Parquet with `doc_id`, `position`, `text`, rows in article order). Writes into RUN_DIR:
`checkpoint.pt` (a second run resumes from it), `curve.jsonl` (one line per minute: throughput, losses, held-out score),
and at the end `encoder.safetensors`, `hypothesizer.safetensors`, `config.json`.

The loss is the sum of two: reconstruction, the cross-entropy of the text given its noised vector; and InfoNCE
(arXiv:1807.03748) between the topic parts of neighbouring chunks of an article, with the other chunks of the batch as
negatives. Noise prepares the hypothesizer for predicted vectors, which are unlike those of texts (`noised`, `blended`).

A frozen encoder keeps the codec's identity: existing vectors, indexes and models stay valid, and only decoded texts
change. A step then costs little more than the hypothesizer's share.
"""

import argparse
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lvm.codec.inverter import hypothesize
from lvm.codec.mini import MiniConfig, MiniEncoder, MiniHypothesizer
from lvm.codec.quality import read_back
from lvm.codec.tokenizer import ChunkTokenizer
from lvm.devices import device_for_mini
from lvm.errors import InputError, OutputError, TrainingError
from lvm.info_nce import info_nce

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TrainingSettings:
    """Hyperparameters; saved with the weights."""

    minutes: float = 60.0
    """Total training time, earlier parts of a resumed run included; the learning rate decays to zero at its end."""
    steps: int | None = None
    """Maximum training steps in all; None for no limit."""
    batch_pairs: int = 160
    """Pairs of neighbouring chunks per step, for InfoNCE."""
    batch_decoded: int = 96
    """Chunks decoded per step, each the first of a pair."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    warmup_steps: int = 150
    """Steps of linear warm-up."""
    decay_share: float = 0.35
    """Last share of the time, in which the learning rate decays linearly to zero."""
    contrast_weight: float = 0.5
    """Weight of InfoNCE (nats per chunk), added to the cross-entropy (nats per token)."""
    temperature: float = 0.06
    """Temperature of InfoNCE on cosines."""
    topic_steps: int = 1500
    """Steps of the first phase (`fit_topics`); under a minute on two cores, not counted in `minutes`."""
    topic_batch_pairs: int = 1024
    """Pairs per step of the first phase."""
    topic_rate_share: float = 0.2
    """Learning rate of the topic embeddings in the main phase, as a share of `learning_rate`."""
    reach: int = 2
    """Maximum distance between the chunks of a pair."""
    noised_share: float = 0.6
    """Share of rows whose vector is noised before decoding."""
    lowest_cosine: float = 0.75
    """Minimum cosine between a noised vector and the true one, drawn uniformly from here to 1."""
    blended_share: float = 0.3
    """Share of rows first blended with vectors of similar topic, as in snapped and predicted vectors."""
    least_own: float = 0.1
    """Minimum weight of a blended row's own vector, drawn uniformly from here to 1."""
    faded_share: float = 0.15
    """Share of rows whose lexical part is scaled down, by a factor from 0.15 to 1."""
    freeze_encoder: bool = False
    """Train only the hypothesizer, so that no vector changes; all chunks of a batch are then decoded."""
    run_length: int = 4
    """Nearby chunks of one article per group in a batch, to be blended; with a frozen encoder only."""
    bfloat16: bool = True
    """Matrix products in bfloat16; without AMX or a GPU, float32 may be faster."""
    held_out_share: float = 0.01
    """Share of articles held out for the score (at least 20 articles)."""
    seed: int = 7
    """Seed of initial weights, batches and noise."""

    def __post_init__(self) -> None:
        if self.minutes <= 0:
            raise InputError(f"minutes must be above 0, got {self.minutes}")
        if self.batch_pairs < 2:
            raise InputError(
                f"batch_pairs must be at least 2 (InfoNCE needs a negative), got {self.batch_pairs}"
            )
        if not 1 <= self.batch_decoded <= self.batch_pairs:
            raise InputError(
                f"batch_decoded must be 1 to batch_pairs = {self.batch_pairs}, got {self.batch_decoded}"
            )
        for name in ("noised_share", "blended_share", "least_own", "faded_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InputError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        if self.run_length < 1:
            raise InputError(f"run_length must be at least 1, got {self.run_length}")


def hold_out(rows: Ints, docs: npt.NDArray[np.int32], share: float, seed: int) -> tuple[Ints, Ints]:
    """Rows of training articles, and those of held-out articles. docs: the article of every row of the corpus. Raises
    InputError for fewer than 40 articles."""
    articles = np.unique(docs)
    if len(articles) < 40:
        raise InputError(f"expected chunks of at least 40 articles to hold some out, got {len(articles)}")
    np.random.default_rng(seed).shuffle(articles)
    is_held = np.isin(docs[rows], articles[: max(20, int(len(articles) * share))])
    return rows[~is_held], rows[is_held]


def padded(
    ids: npt.NDArray[Any], starts: Ints, lengths: Ints, pad_id: int, width: int = 0
) -> tuple[Tensor, Tensor]:
    """Slices of the flat ids as rows (B, T) int64, padded to `width` (0 for the longest), and the mask (B, T) bool,
    True on real tokens. starts, lengths: (B,)."""
    position = np.arange(width or lengths.max())[None]
    mask = position < lengths[:, None]
    flat = np.minimum(starts[:, None] + position, len(ids) - 1)
    return torch.from_numpy(np.where(mask, ids[flat], pad_id).astype(np.int64)), torch.from_numpy(mask)


class ChunkTokens:
    """All chunks as token ids in one flat array, in article order."""

    def __init__(self, ids: npt.NDArray[np.int16], ends: Ints, doc_ids: npt.NDArray[np.int32]):
        self.ids, self.ends, self.doc_ids = ids, ends, doc_ids
        self.starts = np.concatenate((np.zeros(1, np.int64), ends[:-1]))

    def __len__(self) -> int:
        return len(self.ends)

    @classmethod
    def read(cls, directory: Path, tokenizer: ChunkTokenizer, limit: int | None = None) -> "ChunkTokens":
        """Tokenise the chunk shards of a directory. Raises InputError when there are none.

        limit: stop once this many chunks are read; None for all.
        """
        files = sorted(directory.glob("*.parquet"))
        if not files:
            raise InputError(
                f"no *.parquet in {directory}; expected chunk shards, make them with `latent chunk`"
            )
        flat: list[npt.NDArray[np.int16]] = []
        lengths: list[Ints] = []
        docs: list[npt.NDArray[np.int32]] = []
        rows = 0
        columns = ["doc_id", "text"]
        for batch in (b for f in files for b in pq.ParquetFile(f).iter_batches(16384, columns=columns)):
            token_rows, _ = tokenizer.encode(batch.column("text").to_pylist())
            lengths.append(np.fromiter((len(r) for r in token_rows), np.int64, len(token_rows)))
            flat.append(np.concatenate([np.asarray(r, np.int16) for r in token_rows]))
            docs.append(batch.column("doc_id").to_numpy().astype(np.int32))
            rows += len(token_rows)
            if limit is not None and rows >= limit:
                break
        return cls(np.concatenate(flat), np.cumsum(np.concatenate(lengths)), np.concatenate(docs))

    def batch(self, rows: Ints, pad_id: int, width: int = 0) -> tuple[Tensor, Tensor]:
        """Token ids of rows, padded, and their mask, as in `padded`."""
        starts = self.starts[rows]
        return padded(self.ids, starts, self.ends[rows] - starts, pad_id, width)

    def split(self, share: float, seed: int) -> tuple[Ints, Ints]:
        """All rows, split as in `hold_out`."""
        return hold_out(np.arange(len(self)), self.doc_ids, share, seed)


def topic_start(data: ChunkTokens, rows: Ints, config: MiniConfig, seed: int) -> npt.NDArray[np.float32]:
    """Initial topic embeddings, (V, P): latent semantic analysis (Deerwester et al. 1990) with groups of four chunks as
    documents. They are weighted by inverse document frequency, so that their sum over a text is a usable topic vector.
    """
    from scipy.sparse import csr_matrix
    from sklearn.decomposition import TruncatedSVD

    group = 4
    firsts = rows[: min(len(rows), 240_000)]
    lengths = data.ends[firsts] - data.starts[firsts]
    columns = np.concatenate([data.ids[data.starts[r] : data.ends[r]] for r in firsts]).astype(np.int64)
    documents = np.repeat(np.arange(len(firsts)) // group, lengths)
    counts = csr_matrix(
        (np.ones(len(columns), np.float32), (documents, columns)),
        shape=(documents.max() + 1, config.vocabulary_size),
    )
    counts.sum_duplicates()
    counts.data = 1 + np.log(counts.data)
    frequency = np.bincount(counts.indices, minlength=config.vocabulary_size)
    idf = np.log((1 + counts.shape[0]) / (1 + frequency)).astype(np.float32) + 0.1
    svd = TruncatedSVD(config.topic_dim, n_iter=3, random_state=seed)
    weighted = counts.multiply(idf).tocsr()
    svd.fit(weighted)
    # Dividing by the square roots of the singular values damps the first, most common directions.
    table = (svd.components_.T / np.sqrt(svd.singular_values_ / svd.singular_values_[0])[None]) * idf[:, None]
    return np.asarray(table / np.linalg.norm(table, axis=1).mean(), np.float32)


def start_weights(
    config: MiniConfig, data: ChunkTokens, rows: Ints, seed: int
) -> tuple[MiniEncoder, MiniHypothesizer]:
    """Networks with initial weights: topic embeddings by `topic_start`, norms of token embeddings by surprisal."""
    torch.manual_seed(seed)
    encoder = MiniEncoder(config)
    hypothesizer = MiniHypothesizer(config, encoder.topic_norm)
    frequency = np.bincount(data.ids.astype(np.int64), minlength=config.vocabulary_size) + 1.0
    surprisal = -np.log(frequency / frequency.sum())
    # Predictable tokens need less energy in the vector. The mean energy of a token in running text is scaled to 1, as
    # the norm of the topic part assumes.
    amplitude = np.clip(surprisal / 8.0, 0.3, 1.5)
    amplitude /= math.sqrt((frequency * amplitude**2).sum() / frequency.sum())
    with torch.no_grad():
        encoder.tokens.weight.mul_(torch.from_numpy(amplitude).float()[:, None])
        encoder.topics.weight.copy_(torch.from_numpy(topic_start(data, rows, config, seed)))
        # The priors add about 10 <x, e> to the logits, that is 10 |e|^2 for a token that is present. As in a matched
        # filter, half of that is subtracted, so that tokens of high norm do not win where they are absent.
        hypothesizer.bias.copy_(torch.from_numpy(-0.5 * surprisal - 5.0 * amplitude**2).float())
    return encoder, hypothesizer


def neighbours_of(picked: Ints, doc_ids: npt.NDArray[np.int32], reach: int, rng: np.random.Generator) -> Ints:
    """For each row (which has a next one in its article), a random row up to `reach` later in the same article."""
    further = np.minimum(picked + rng.integers(1, reach + 1, len(picked)), len(doc_ids) - 1)
    return np.where(doc_ids[further] == doc_ids[picked], further, picked + 1)


def fit_topics(encoder: MiniEncoder, data: ChunkTokens, anchors: Ints, settings: TrainingSettings) -> float:
    """First phase: trains the topic embeddings, in place, by InfoNCE on bags of them; returns the last loss in nats.

    A bag needs no matrix product, so a step covers thousands of chunks and soon beats latent semantic analysis (R@10 of
    the next chunk among 10,000: 0.074 before, 0.136 after 30 s on two cores).
    """
    table = encoder.topics.weight
    optimiser = torch.optim.Adam([table], lr=3e-3)
    rng = np.random.default_rng(settings.seed)
    loss = torch.tensor(math.nan)
    for step in range(settings.topic_steps):
        picked = rng.choice(anchors, settings.topic_batch_pairs)
        rows = np.concatenate((picked, neighbours_of(picked, data.doc_ids, settings.reach + 1, rng)))
        ids, mask = data.batch(rows, 0)
        ends = mask.sum(1).cumsum(0)
        starts = F.pad(ends, (1, 0))[:-1]
        bags = F.embedding_bag(ids[mask].to(table.device), table, starts.to(table.device), mode="sum")
        first, second = F.normalize(bags, dim=-1).chunk(2)
        loss = info_nce(first, second, settings.temperature, both_ways=True)
        optimiser.param_groups[0]["lr"] = 3e-3 * (1 - step / settings.topic_steps)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    with torch.no_grad():  # a fixed scale, as the contextual part is added later
        table.div_(table.norm(dim=1).mean())
    return loss.item()


def runs_of(
    picked: Ints, doc_ids: npt.NDArray[np.int32], length: int, reach: int, rng: np.random.Generator
) -> Ints:
    """(B * length,) each picked row followed by `length` - 1 rows of its article, each up to `reach` after the
    previous.

    Where the article ends too early, rows before the picked one are used instead, or that row itself.
    """
    rows = [picked]
    for _ in range(length - 1):
        further = np.minimum(rows[-1] + rng.integers(1, reach + 1, len(picked)), len(doc_ids) - 1)
        back = np.maximum(picked - len(rows), 0)
        row = np.where(doc_ids[further] == doc_ids[picked], further, back)
        rows.append(np.where(doc_ids[row] == doc_ids[picked], row, picked))
    return np.stack(rows, axis=1).reshape(-1)


def blended(vectors: Tensor, pool: Tensor, settings: TrainingSettings, topic_dim: int) -> Tensor:
    """Vectors (B, D) float32 of unit norm, some of them blended with similar rows of the pool (N, D), which starts with
    the same B vectors.

    A predicted or snapped vector is a mean of many texts: their topics agree, while only common words add up. Here the
    mean is weighted by a softmax over topic cosines with a random temperature, from about a single neighbour to the
    mean of the batch; a row itself is left out.
    """
    B, device = vectors.shape[0], vectors.device
    with torch.no_grad():
        topics = F.normalize(pool[:, :topic_dim], dim=-1)
        cosines = topics[:B] @ topics.T
        cosines[torch.arange(B), torch.arange(B)] = float("-inf")
        sharpness = 1.0 / (0.02 + 0.3 * torch.rand(B, 1, device=device))
        mean = F.normalize((cosines * sharpness).softmax(dim=-1) @ pool, dim=-1)
    own = settings.least_own + (1 - settings.least_own) * torch.rand(B, 1, device=device)
    chosen = torch.rand(B, 1, device=device) < settings.blended_share
    return F.normalize(torch.where(chosen, own * vectors + (1 - own) * mean, vectors), dim=-1)


def noised(vectors: Tensor, settings: TrainingSettings, topic_dim: int) -> Tensor:
    """Unit vectors (B, D), some with a weaker lexical part, some with noise, as a predictor might return them."""
    B = vectors.shape[0]
    fade = torch.rand(B, 1, device=vectors.device)
    factor = torch.where(
        fade < settings.faded_share, 0.15 + 0.85 * fade / settings.faded_share, torch.ones_like(fade)
    )
    topic, lexical = vectors[:, :topic_dim], vectors[:, topic_dim:]
    vectors = F.normalize(torch.cat((topic, lexical * factor), dim=-1), dim=-1)
    cosine = settings.lowest_cosine + (1 - settings.lowest_cosine) * torch.rand(B, 1, device=vectors.device)
    tangent = (1 / cosine**2 - 1).sqrt()
    chosen = torch.rand(B, 1, device=vectors.device) < settings.noised_share
    noise = F.normalize(torch.randn_like(vectors), dim=-1) * tangent * chosen
    return F.normalize(vectors + noise, dim=-1)


def losses(
    encoder: MiniEncoder,
    hypothesizer: MiniHypothesizer,
    ids: Tensor,
    mask: Tensor,
    settings: TrainingSettings,
) -> tuple[Tensor, Tensor]:
    """Reconstruction loss in nats per token, and InfoNCE in nats per chunk (0 with a frozen encoder); float32 scalars.

    ids, mask: (2B, T), where row i + B is the neighbour of row i and the first `batch_decoded` rows are decoded. With a
    frozen encoder (B, T), all decoded.
    """
    P = encoder.config.topic_dim
    with torch.set_grad_enabled(not settings.freeze_encoder):
        vectors = encoder(ids, mask)
    if settings.freeze_encoder:
        contrast, B = vectors.new_zeros(()), len(ids)
    else:
        first, second = F.normalize(vectors[:, :P], dim=-1).chunk(2)
        contrast = info_nce(first, second, settings.temperature, both_ways=True)
        B = settings.batch_decoded
    given = noised(blended(vectors[:B], vectors, settings, P), settings, P)
    states = hypothesizer(given, ids[:B], mask[:B], encoder)
    logits = F.linear(states[mask[:B]], encoder.tokens.weight) + hypothesizer.bias
    return F.cross_entropy(logits.float(), ids[:B][mask[:B]]), contrast


@torch.inference_mode()
def recentre(encoder: MiniEncoder, data: ChunkTokens, rows: Ints, pad_id: int) -> None:
    """Set the encoder's `centre` to the mean topic part of 2,048 of these chunks.

    A running mean would lag behind the weights and make unrelated texts look similar.
    """
    device = encoder.tokens.weight.device
    total = torch.zeros_like(encoder.centre)
    picked = rows[np.linspace(0, len(rows) - 1, min(2048, len(rows)), dtype=np.int64)]
    for part in np.array_split(picked, max(1, len(picked) // 256)):
        ids, mask = (t.to(device) for t in data.batch(part, pad_id))
        total += encoder.topic(ids, encoder.tokens(ids), mask).sum(0)
    encoder.centre.copy_(total / len(picked))


@torch.inference_mode()
def held_out_score(
    encoder: MiniEncoder,
    hypothesizer: MiniHypothesizer,
    data: ChunkTokens,
    rows: Ints,
    tokenizer: ChunkTokenizer,
    num_decoded: int = 256,
) -> dict[str, float]:
    """Quality of the hypothesizer's texts of held-out chunks (`read_back`), and cosines of successive and of unrelated
    chunks."""
    rows = rows[np.linspace(0, len(rows) - 2, num_decoded, dtype=np.int64)]
    device = encoder.tokens.weight.device
    nexts = np.minimum(rows + 1, len(data) - 1)
    both = [data.batch(r, tokenizer.pad_id) for r in (rows, nexts)]
    first, second = (encoder(ids.to(device), mask.to(device)) for ids, mask in both)
    cosines = (first @ second.T).float().cpu().numpy()
    adjacent = data.doc_ids[rows] == data.doc_ids[nexts]
    sources = tokenizer.decode([data.ids[data.starts[r] : data.ends[r]].tolist() for r in rows])
    written = tokenizer.decode(hypothesize(encoder, hypothesizer, first, tokenizer.end_id))
    strangers = cosines[~np.eye(len(rows), dtype=bool)]
    ranks = (cosines >= np.diag(cosines)[:, None]).sum(1)[adjacent]
    return {
        **read_back(sources, written),
        "neighbour_cosine": float(np.diag(cosines)[adjacent].mean()),
        "stranger_cosine": float(strangers.mean()),
        "next_r1_of_256": float((ranks == 1).mean()),
    }


def optimiser_for(
    encoder: MiniEncoder, hypothesizer: MiniHypothesizer, settings: TrainingSettings
) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only, not on embeddings, norms and biases."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for module in (hypothesizer,) if settings.freeze_encoder else (encoder, hypothesizer):
        for name, parameter in module.named_parameters():
            is_matrix = parameter.ndim == 2 and not name.startswith("tokens") and "bias" not in name
            if name != "topics.weight":
                (matrices if is_matrix else others).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": 0.05, "rate": 1.0},
        {"params": others, "weight_decay": 0.0, "rate": 1.0},
    ]
    if not settings.freeze_encoder:
        topics = {"params": [encoder.topics.weight], "weight_decay": 0.0, "rate": settings.topic_rate_share}
        groups.append(topics)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), eps=1e-7)


def learning_rate_at(step: int, spent_s: float, settings: TrainingSettings) -> float:
    """Linear warm-up, a plateau, then linear decay to zero at `minutes` or `steps`, whichever comes first."""
    rise = min(1.0, (step + 1) / settings.warmup_steps)
    gone = spent_s / (settings.minutes * 60)
    if settings.steps is not None:
        gone = max(gone, step / settings.steps)
    left = max(0.0, 1.0 - gone)
    return settings.learning_rate * rise * min(1.0, left / settings.decay_share)


def save_weights(
    directory: Path, encoder: MiniEncoder, hypothesizer: MiniHypothesizer, record: dict[str, Any]
) -> None:
    """Write bfloat16 safetensors and config.json; each under a temporary name, then renamed."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, module in (("encoder", encoder), ("hypothesizer", hypothesizer)):
        state = module.state_dict()
        tensors = {k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in state.items()}
        temporary = directory / f".{name}.safetensors.tmp"
        save_file(tensors, temporary, metadata={"format": "pt"})
        os.replace(temporary, directory / f"{name}.safetensors")
    temporary = directory / ".config.json.tmp"
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, directory / "config.json")


def load_weights(
    directory: Path, config: MiniConfig, tokenizer: ChunkTokenizer
) -> tuple[MiniEncoder, MiniHypothesizer]:
    """Networks with the weights in a codec's folder. Raises InputError when they do not fit."""
    try:
        record = json.loads((directory / "config.json").read_text())
        if record["config"] != config.to_dict():
            raise InputError(
                f"{directory} was made with {record['config']}, expected {config.to_dict()}; choose another --init"
            )
        if record["tokenizer_sha256"] != tokenizer.sha256:
            raise InputError(
                f"{directory} was trained with tokenizer {record['tokenizer_sha256'][:16]}, "
                f"got {tokenizer.sha256[:16]}; give the tokenizer.json of --init"
            )
        encoder = MiniEncoder(config)
        hypothesizer = MiniHypothesizer(config, encoder.topic_norm)
        encoder.load_state_dict(load_file(directory / "encoder.safetensors"))
        hypothesizer.load_state_dict(load_file(directory / "hypothesizer.safetensors"))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as err:
        raise InputError(
            f"cannot load a codec from {directory} ({err}); expected config.json, encoder.safetensors and "
            "hypothesizer.safetensors"
        ) from err
    return encoder, hypothesizer


def require_same_run(
    output: Path,
    chunks: Path,
    tokenizer: ChunkTokenizer,
    config: MiniConfig,
    settings: TrainingSettings,
    limit: int | None = None,
) -> None:
    """Check that the run in `output` may resume with these inputs and settings; for a new run, store them.

    Raises OutputError naming what differs: chunks (by content), tokenizer, configuration, whether the encoder is
    frozen, or what determines the held-out articles, which must never be trained on. Runs of an old version did not
    store them; for those a warning is printed, and `fit` checks only the configuration.
    """
    digest = hashlib.sha256()
    for file in sorted(chunks.glob("*.parquet")):
        with file.open("rb") as shard:
            digest.update(hashlib.file_digest(shard, "sha256").digest())
    wanted = {
        "configuration": config.to_dict(),
        "tokenizer": tokenizer.sha256[:16],
        "chunks": digest.hexdigest()[:16],
        "limit": limit,
        "frozen encoder": settings.freeze_encoder,
        "seed": settings.seed,
        "held-out share": settings.held_out_share,
    }
    note = output / "run.json"
    if (output / "checkpoint.pt").exists():
        if not note.exists():
            print(f"{output} does not record its chunks and tokenizer; resuming without a check", flush=True)
            return
        found = json.loads(note.read_text())
        if differ := [name for name in wanted if found.get(name) != wanted[name]]:
            named = "; ".join(f"{name} {found.get(name)}, got {wanted[name]}" for name in differ)
            raise OutputError(
                f"{output} holds a run with {named}; use its original inputs, or choose another --output"
            )
        return
    output.mkdir(parents=True, exist_ok=True)
    temporary = output / ".run.json.tmp"
    temporary.write_text(json.dumps(wanted, indent=1) + "\n")
    os.replace(temporary, note)


def fit(
    chunks: Path,
    tokenizer: ChunkTokenizer,
    output: Path,
    config: MiniConfig,
    settings: TrainingSettings,
    device: str = "cpu",
    limit: int | None = None,
    compiled: bool = False,
    save_every_s: float = 300.0,
    score_every_s: float = 60.0,
    on_score: Callable[[dict[str, Any]], object] | None = None,
    init: Path | None = None,
) -> dict[str, Any]:
    """Train for `settings.minutes`, resuming from `output/checkpoint.pt` if it exists.

    limit: as in `ChunkTokens.read`. on_score: called with each line of the curve. init: folder of a codec of the same
    configuration; a new run starts from its weights and skips the topic phase. Returns the last held-out score with
    steps, chunks and seconds. Raises OutputError when the existing run has other inputs or settings
    (`require_same_run`), InputError when `init` does not fit or is missing for a frozen encoder, and TrainingError when
    the loss is not finite.
    """
    if settings.freeze_encoder and init is None:
        raise InputError("a frozen encoder needs weights to start from; give --init with a codec's folder")
    require_same_run(output, chunks, tokenizer, config, settings, limit)
    data = ChunkTokens.read(chunks, tokenizer, limit)
    train_rows, held_rows = data.split(settings.held_out_share, settings.seed)
    print(f"{len(train_rows):,} chunks to train on, {len(held_rows):,} held out", flush=True)
    has_next = np.zeros(len(data), bool)
    has_next[:-1] = data.doc_ids[:-1] == data.doc_ids[1:]
    anchors = train_rows[has_next[train_rows]]

    checkpoint = output / "checkpoint.pt"
    state: dict[str, Any] | None = None
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        if state["config"] != config.to_dict():
            raise OutputError(
                f"{checkpoint} was made with {state['config']}, expected {config.to_dict()}; choose another --output"
            )
        encoder = MiniEncoder(config)
        hypothesizer = MiniHypothesizer(config, encoder.topic_norm)
        encoder.load_state_dict(state["encoder"])
        hypothesizer.load_state_dict(state["hypothesizer"])
    elif init is not None:
        encoder, hypothesizer = load_weights(init, config, tokenizer)
    else:
        encoder, hypothesizer = start_weights(config, data, train_rows, settings.seed)
    encoder.to(device).requires_grad_(not settings.freeze_encoder)
    hypothesizer.to(device)
    if state is None and init is None:
        nats = fit_topics(encoder, data, anchors, settings)
        print(f"topic phase done, InfoNCE {nats:.3f} nats", flush=True)
    optimiser = optimiser_for(encoder, hypothesizer, settings)
    step, spent_s, chunks_seen = 0, 0.0, 0
    if state is not None:
        optimiser.load_state_dict(state["optimiser"])
        step, spent_s, chunks_seen = state["step"], state["spent_s"], state["chunks_seen"]
        print(f"resuming at step {step}, after {spent_s / 60:.1f} minutes", flush=True)

    encoder.train(not settings.freeze_encoder)
    if compiled:
        encoder.compile()
        hypothesizer.compile()
    rng = np.random.default_rng((settings.seed, step))
    torch.manual_seed(settings.seed + step)
    kind = torch.device(device).type
    parameters = [p for m in (encoder, hypothesizer) for p in m.parameters() if p.requires_grad]
    recent: list[tuple[float, float]] = []
    last_score = last_save = spent_s
    score: dict[str, Any] = {}

    def save() -> None:
        record = {"config": config.to_dict(), "step": step, "spent_s": spent_s, "chunks_seen": chunks_seen}
        parts: dict[str, Any] = {"encoder": encoder, "hypothesizer": hypothesizer, "optimiser": optimiser}
        temporary = checkpoint.with_suffix(".tmp")
        torch.save(record | {name: part.state_dict() for name, part in parts.items()}, temporary)
        os.replace(temporary, checkpoint)

    while True:
        done = spent_s >= settings.minutes * 60 or (settings.steps is not None and step >= settings.steps)
        # --- score and log
        if done or spent_s - last_score >= score_every_s:
            encoder.eval()
            hypothesizer.eval()
            with torch.compiler.set_stance("force_eager"):
                if not settings.freeze_encoder:
                    recentre(encoder, data, train_rows, tokenizer.pad_id)
                score = held_out_score(encoder, hypothesizer, data, held_rows, tokenizer)
            encoder.train(not settings.freeze_encoder)  # a frozen encoder is centred as in inference
            hypothesizer.train()
            mean = np.mean(recent, axis=0) if recent else (math.nan, math.nan)
            line = {
                "step": step,
                "minutes": round(spent_s / 60, 2),
                "chunks_seen": chunks_seen,
                "chunks_per_s": round(chunks_seen / max(spent_s, 1e-9), 1),
                "nats_a_token": round(float(mean[0]), 4),
                "contrast_nats": round(float(mean[1]), 4),
                **{k: round(v, 4) for k, v in score.items()},
            }
            with (output / "curve.jsonl").open("a") as curve:
                curve.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
            if on_score is not None:
                on_score(line)
            recent.clear()
            last_score = spent_s
        if done or spent_s - last_save >= save_every_s:
            save()
            last_save = spent_s
        if done:
            break
        # --- step; scoring and saving do not count as training time
        started = time.perf_counter()
        for group in optimiser.param_groups:
            group["lr"] = group["rate"] * learning_rate_at(step, spent_s, settings)
        if settings.freeze_encoder:
            picked = rng.choice(anchors, -(-settings.batch_decoded // settings.run_length))
            rows = runs_of(picked, data.doc_ids, settings.run_length, settings.reach, rng)
            rows = rows[: settings.batch_decoded]
        else:
            picked = rng.choice(anchors, settings.batch_pairs)
            rows = np.concatenate((picked, neighbours_of(picked, data.doc_ids, settings.reach, rng)))
        ids, mask = data.batch(rows, tokenizer.pad_id, config.max_tokens)
        ids, mask = ids.to(device), mask.to(device)
        with torch.autocast(kind, torch.bfloat16, enabled=settings.bfloat16):
            reconstruction, contrast = losses(encoder, hypothesizer, ids, mask, settings)
        loss = reconstruction + settings.contrast_weight * contrast
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the codec's loss is {loss.item()} at step {step}; expected a finite number. Lower "
                f"--learning-rate and run again; it resumes from {checkpoint}"
            )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        recent.append((reconstruction.item(), contrast.item()))
        step += 1
        chunks_seen += settings.batch_decoded
        spent_s += time.perf_counter() - started

    summary = {"steps": step, "chunks_seen": chunks_seen, "seconds": round(spent_s), **score}
    record = {
        "format": 1,
        "config": config.to_dict(),
        "training": asdict(settings),
        "tokenizer_sha256": tokenizer.sha256,
        "num_training_chunks": len(train_rows),
        "held_out": summary,
    }
    save_weights(output, encoder, hypothesizer, record)
    return summary


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the module's docstring. Options named like fields of TrainingSettings set them."""
    defaults = TrainingSettings()
    parser = argparse.ArgumentParser(description="Fit the mini codec on chunk shards.", allow_abbrev=False)
    parser.add_argument("--chunks", type=Path, required=True, help="folder of chunk shards (Parquet)")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json")
    parser.add_argument("--output", type=Path, required=True, help="run folder; an existing run is resumed")
    parser.add_argument("--minutes", type=float, default=defaults.minutes, help="total training time")
    parser.add_argument("--steps", type=int, help="total steps, if reached before the minutes")
    parser.add_argument("--batch-pairs", type=int, default=defaults.batch_pairs)
    parser.add_argument("--batch-decoded", type=int, default=defaults.batch_decoded)
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    parser.add_argument("--init", type=Path, help="folder of a codec to start a new run from")
    parser.add_argument("--freeze-encoder", action="store_true", help="train only the hypothesizer")
    parser.add_argument("--blended-share", type=float, default=defaults.blended_share)
    parser.add_argument("--noised-share", type=float, default=defaults.noised_share)
    parser.add_argument(
        "--float32", dest="bfloat16", action="store_false", help="matrix products in float32, not bfloat16"
    )
    parser.add_argument("--contrast-weight", type=float, default=defaults.contrast_weight)
    parser.add_argument("--topic-share", type=float, default=MiniConfig().topic_share)
    parser.add_argument("--decoder-layers", type=int, default=MiniConfig().decoder_layers)
    parser.add_argument("--limit", type=int, help="use only the first N chunks")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--device", default=str(device_for_mini()))
    parser.add_argument("--threads", type=int, help="torch threads")
    parser.add_argument("--score-every", type=float, default=1.0, help="minutes between held-out scores")
    parser.add_argument("--compile", action="store_true", help="compile the step (needs a C++ compiler)")
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    config = MiniConfig(topic_share=args.topic_share, decoder_layers=args.decoder_layers)
    fields = TrainingSettings.__dataclass_fields__
    settings = TrainingSettings(**{name: value for name, value in vars(args).items() if name in fields})
    tokenizer = ChunkTokenizer.load(args.tokenizer, config.max_tokens)
    paths = (args.chunks, tokenizer, args.output)
    options = {"compiled": args.compile, "score_every_s": args.score_every * 60, "init": args.init}
    summary = fit(*paths, config, settings, args.device, args.limit, **options)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
