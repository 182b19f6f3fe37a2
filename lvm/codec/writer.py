"""A language model conditioned on a vector: fluent text for vectors that encode no actual text.

A decoder that inverts an encoder is exact on the vector of an actual text but fails on a blend of several. For blends,
a small pretrained language model writes the text. Its prefix is the evidence words (`lvm.codec.evidence`), each the
mean of its token embeddings plus a strength embedding, and a few soft positions computed from the vector. A low-rank
adapter is trained to follow the prefix (`lvm.codec.writer_training`).

The language model is a third party's and is not shipped: it must be installed, and is identified by hash. Adapter and
evidence network are ours, in the writer's folder:

    writer.json            sizes, codec identity, hash of the language model, training
    writer.safetensors     adapter and prefix
    evidence.safetensors   the evidence network
    words.txt              its words, one per line

Letters: B vectors, S prefix positions, E evidence words per vector, N words in the list, V' ids that may be written, W
the language model's width, D vector length.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lvm.codec.evidence import Evidence
from lvm.codec.identity import CodecIdentity
from lvm.codec.language_model import HOW_TO_GET, LEAST_LOG_PROB, REPOSITORY, USUAL_LOG_PROB, Base, log_probs
from lvm.codec.llama import Adapter, Llama, LlamaRunner
from lvm.codec.runner import Precision, best_precision
from lvm.codec.writing import WritingRounds, Written
from lvm.errors import InputError

FILES = ("writer.json", "writer.safetensors", "evidence.safetensors", "words.txt")


@dataclass(frozen=True)
class WriterConfig:
    """Sizes of prefix and adapter, which determine the shapes of the weights."""

    dim: int
    """Length of a vector, D."""
    num_words: int
    """Words in the evidence network's list, N."""
    evidence_words: int = 12
    """Evidence words per vector, E."""
    soft_positions: int = 4
    """Prefix positions computed from the vector."""
    soft_width: int = 512
    """Hidden width of the network that computes the soft positions."""
    evidence_width: int = 384
    """Hidden width of the evidence network."""
    rank: int = 16
    """Rank of the adapter."""


class Prefix(nn.Module):
    """Vectors to the embeddings that precede the text."""

    kept: Tensor
    table: Tensor

    def __init__(self, config: WriterConfig, base: Llama, words: Sequence[str], kept: Tensor) -> None:
        """words: the evidence network's list; kept: (V',) int64, the ids that may be written."""
        super().__init__()
        self.config, self.words = config, list(words)
        W = base.config.hidden_size
        embeddings = base.weights["embed_tokens.weight"].float()
        scale = float(embeddings.std())
        self.evidence = Evidence(config.dim, config.num_words, config.evidence_width)
        self.strength = nn.Parameter(torch.randn(W) * 0.1 * scale)
        self.offset = nn.Parameter(torch.zeros(W))
        self.soft = nn.Sequential(
            nn.Linear(config.dim + 1, config.soft_width),
            nn.GELU(),
            nn.Linear(config.soft_width, config.soft_positions * W),
        )
        last = self.soft[2]
        assert isinstance(last, nn.Linear)
        nn.init.normal_(last.weight, std=scale * config.soft_width**-0.5)
        encoded = [e.ids for e in base.tokenizer.encode_batch_fast([f" {word}" for word in words])]
        self.first_ids = [ids[0] for ids in encoded]
        """First token id of each word after a space."""
        rows = torch.tensor([i for ids in encoded for i in ids])
        starts = torch.tensor([0] + [len(ids) for ids in encoded[:-1]]).cumsum(0)
        table = F.embedding_bag(rows, embeddings, starts, mode="mean") if len(rows) else embeddings[:0]
        self.register_buffer("table", table, persistent=False)
        self.register_buffer("kept", kept)

    @property
    def positions(self) -> int:
        """Number of prefix positions, S."""
        return self.config.evidence_words + self.config.soft_positions

    def forward(self, vectors: Tensor) -> Tensor:
        """(B, D) unit vectors to (B, S, W) float32."""
        return self.of_words(vectors, *self.evidence.words(vectors, self.config.evidence_words))

    def of_words(self, vectors: Tensor, ids: Tensor, strengths: Tensor) -> Tensor:
        """`forward` for evidence already computed: ids and strengths, (B, E) each."""
        words = self.table[ids] + self.offset + strengths[..., None] * self.strength
        soft = self.soft(self.evidence.centred(vectors)).view(len(vectors), self.config.soft_positions, -1)
        return torch.cat((words, soft), dim=1)


def save_writer(
    folder: Path,
    prefix: Prefix,
    adapter: Adapter,
    identity: CodecIdentity,
    base: Base,
    record: dict[str, Any],
) -> None:
    """Write the four files, writer.json last; each under a temporary name, then renamed. record: more fields for
    writer.json."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)

    def put(name: str, write: Callable[[Path], object]) -> None:
        temporary = folder / f".{name}.tmp"
        write(temporary)
        os.replace(temporary, folder / name)

    def put_tensors(name: str, tensors: dict[str, Tensor]) -> None:
        half = {k: v if v.dtype == torch.int64 else v.detach().bfloat16() for k, v in tensors.items()}
        half = {k: v.cpu().contiguous() for k, v in half.items()}
        put(name, lambda p: save_file(half, p, metadata={"format": "pt"}))

    state = prefix.state_dict()
    rest = {f"prefix.{k}": v for k, v in state.items() if not k.startswith("evidence.")}
    rest |= {f"adapter.{k}": v for k, v in adapter.state_dict().items()}
    put("words.txt", lambda p: p.write_text("\n".join(prefix.words) + "\n", encoding="utf-8"))
    put_tensors("evidence.safetensors", _under("evidence.", state))
    put_tensors("writer.safetensors", rest)
    whole = {
        "format": 1,
        "config": asdict(prefix.config),
        "codec": identity.to_dict(),
        "base": {"sha256": base.sha256, "file": base.path.name, "repository": REPOSITORY},
        **record,
    }
    put("writer.json", lambda p: p.write_text(json.dumps(whole, indent=1) + "\n"))


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


@dataclass(frozen=True)
class WritingSettings:
    """Sampling of texts."""

    max_tokens: int = 48
    """Maximum tokens of a text, end token included."""
    temperature: float = 0.7
    """Sampling temperature of all candidates but the first, which is greedy."""
    top_k: int = 40
    """Sample from this many of the likeliest tokens."""
    bonus: float = 1.0
    """Nats added to the first token of each evidence word not written yet, per unit of its strength. On 100
    predictions, a bonus of 0, 0.4 and 0.8 gives texts with centred cosine 0.124, 0.140 and 0.152 to the true next text,
    of which 66, 71 and 76 % have a keyword, and log-probability -0.76, -0.84 and -0.87 (real text: -1.23;
    tests/bench/results/LOG.md)."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.top_k < 1 or self.temperature <= 0:
            raise InputError(f"max_tokens and top_k must be at least 1 and temperature above 0, got {self}")


@dataclass
class Parts:
    """The contents of a writer's folder."""

    prefix: Prefix
    adapter: Adapter
    identity: CodecIdentity
    record: dict[str, Any]
    folder: Path


class Writer:
    """Writes texts for vectors of one codec."""

    def __init__(
        self,
        parts: Parts,
        base: Base,
        precision: Precision | None = None,
        device: torch.device | None = None,
        settings: WritingSettings | None = None,
    ) -> None:
        """precision: of the matrix products; None for the device's fastest."""
        self.identity = parts.identity
        self.settings = settings or WritingSettings()
        self.device = device or torch.device("cpu")
        self.precision = precision or best_precision(self.device)
        self._base, self._record, self.folder = base, parts.record, parts.folder
        self.prefix = parts.prefix.to(self.device).eval().requires_grad_(False)
        kept = self.prefix.kept.cpu()
        self.runner = LlamaRunner(base.model, self.precision, parts.adapter, kept, self.device)
        self._kept: list[int] = kept.tolist()
        index = {token: i for i, token in enumerate(self._kept)}
        self.end_index = index[base.end_id]
        """Index of the end token among the kept ids."""
        first = [index.get(token, -1) for token in self.prefix.first_ids]
        self.first_indices = torch.tensor(first, device=self.device)
        """(N,) index among the kept ids of each evidence word's first token, -1 if it is not kept."""
        special = [i for i, token in enumerate(self._kept) if self._special(token) and i != self.end_index]
        self.banned = torch.tensor(special, dtype=torch.int64, device=self.device)
        """Indices of the control tokens, which are never written."""

    @property
    def centre(self) -> npt.NDArray[np.float32]:
        """(D,) mean of the vectors the writer was trained on."""
        return np.asarray(self.prefix.evidence.centre.float().cpu().numpy(), np.float32)

    @cached_property
    def digest(self) -> str:
        """Hash of weights, language model, settings and precision, 64 hex digits."""
        digest = hashlib.sha256(f"{self._base.sha256} {self.settings} {self.precision}".encode())
        for file in FILES:
            digest.update(hashlib.sha256((self.folder / file).read_bytes()).digest())
        return digest.hexdigest()

    @property
    def least_log_prob(self) -> float:
        """Mean log-probability per character under the language model, nats, that 98 % of real chunks reach."""
        return float(self._record.get("least_log_prob", LEAST_LOG_PROB))

    @property
    def usual_log_prob(self) -> float:
        """As `least_log_prob`, for 75 % of real chunks."""
        return float(self._record.get("usual_log_prob", USUAL_LOG_PROB))

    def drafting(self) -> WritingRounds:
        """A new batch for writing texts."""
        return WritingRounds(self)

    def finished(self, indices: Sequence[int], log_prob: float) -> Written:
        """The text of these indices into the kept ids. log_prob: of the whole text, nats."""
        text: str = self._base.model.tokenizer.decode([self._kept[i] for i in indices])
        return Written(" ".join(text.split()), log_prob / max(1, len(text)))

    def _special(self, token: int) -> bool:
        name = self._base.model.tokenizer.id_to_token(token) or ""
        return name.startswith("<") and name.endswith(">") and len(name) > 2

    @staticmethod
    def parts(folder: Path, base: Base, identity: CodecIdentity | None) -> Parts:
        """Load a writer's folder.

        Raises InputError if a file is missing or damaged, or if the writer was made for another language model or for
        a codec other than `identity` (None accepts any).
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            record = json.loads((folder / "writer.json").read_text())
            config = WriterConfig(**record["config"])
            own = CodecIdentity.from_dict(record["codec"])
            words = (folder / "words.txt").read_text(encoding="utf-8").split("\n")[:-1]
            rest = load_file(folder / "writer.safetensors")
            evidence = load_file(folder / "evidence.safetensors")
            wanted = record["base"]["sha256"]
            if wanted != base.sha256:
                raise InputError(
                    f"it was made for the language model with sha256 {wanted[:16]} "
                    f"({record['base']['file']}), got {base.sha256[:16]} ({base.path}); {HOW_TO_GET}"
                )
            if identity is not None and own.digest != identity.digest:
                raise InputError(
                    f"it writes for codec {own}, got vectors of {identity}; fit one with `latent train-writer`"
                )
            if len(words) != config.num_words:
                raise InputError(
                    f"words.txt has {len(words)} words, writer.json says {config.num_words}; copy the folder again"
                )
            prefix = Prefix(config, base.model, words, rest["prefix.kept"])
            prefix.load_state_dict(
                _under("prefix.", rest) | {f"evidence.{k}": v for k, v in evidence.items()}
            )
            adapter = Adapter(base.model.config, config.rank)
            adapter.load_state_dict(_under("adapter.", rest))
        except InputError as err:
            raise InputError(f"{folder} holds no usable writer: {err}") from err
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as err:
            raise InputError(
                f"cannot load a writer from {folder} ({err}); expected {', '.join(FILES)} from `latent train-writer`"
            ) from err
        return Parts(prefix, adapter, own, record, folder)

    def write(self, vectors: npt.NDArray[np.float32], candidates: int = 1) -> list[list[Written]]:
        """`candidates` texts for each of (B, D) unit vectors: one decoded greedily, the others sampled with a seed from
        the vector, so that the same vector gives the same texts."""
        rounds = WritingRounds(self)
        tickets = [rounds.add(vector, candidates) for vector in vectors]
        done: dict[int, list[Written]] = {}
        while len(rounds):
            done |= rounds.run(self.settings.max_tokens)
        return [done[ticket] for ticket in tickets]

    @cached_property
    def unadapted(self) -> LlamaRunner:
        """The language model without the adapter; loaded on first use."""
        return LlamaRunner(self._base.model, self.precision, device=self.device)

    def log_probs(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Log-probabilities of N texts under the language model without the adapter, as in `language_model.log_probs`.

        Real Wikipedia chunks have about -1.2; text that is not language far less.
        """
        return log_probs(self.unadapted, self._base.model.tokenizer, texts)
