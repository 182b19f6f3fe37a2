"""Continuous batching for the writer: between tokens, new texts join the batch and finished ones leave.

Letters: C candidates per vector, D vector length.
"""

import hashlib
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lvm.codec.inverter import LEAVE_SHARE
from lvm.codec.llama import LlamaCache
from lvm.errors import InputError

if TYPE_CHECKING:
    from lvm.codec.writer import Writer


@dataclass(frozen=True)
class Written:
    """One text for a vector."""

    text: str
    log_prob: float
    """Mean natural log-probability per character under the writer."""


@dataclass
class _Row:
    """One text being written."""

    ticket: int
    candidate: int
    """0 for the text decoded greedily."""
    uniforms: npt.NDArray[np.float32]
    """(max_tokens,) uniform random numbers for sampling."""
    tokens: list[int]
    """Indices into the kept ids."""
    log_prob: float = 0.0
    done: bool = False


class WritingRounds:
    """The batch of texts being written. Not thread-safe."""

    def __init__(self, writer: "Writer", max_rows: int = 128) -> None:
        """max_rows: maximum texts in the batch; more wait."""
        self._writer, self._max_rows = writer, max_rows
        self._waiting: deque[tuple[int, npt.NDArray[np.float32], int]] = deque()
        self._rows: list[_Row] = []
        self._done: dict[int, list[Written | None]] = {}
        self._next = 0
        self._cache: LlamaCache | None = None
        # Per row: the state that predicts the next token; first tokens of its evidence words; bonus of those not
        # written yet.
        self._state = self._first = self._bonus = torch.empty(0)

    def __len__(self) -> int:
        """Number of vectors with unfinished texts."""
        return len(self._waiting) + len(self._done)

    def add(self, vector: npt.NDArray[np.float32], candidates: int = 1) -> int:
        """Queue a unit vector (D,), which joins when the batch has room; returns its ticket."""
        if not 1 <= candidates <= self._max_rows:
            raise InputError(f"candidates must be from 1 to {self._max_rows}, got {candidates}")
        ticket = self._next
        self._next += 1
        self._waiting.append((ticket, np.ascontiguousarray(vector, np.float32), candidates))
        return ticket

    def drop(self, ticket: int) -> None:
        """Cancel a vector."""
        self._waiting = deque(w for w in self._waiting if w[0] != ticket)
        if self._done.pop(ticket, None) is not None:
            self._keep([i for i, row in enumerate(self._rows) if row.ticket != ticket])

    @torch.inference_mode()
    def run(self, tokens: int = 8) -> dict[int, list[Written]]:
        """Write up to `tokens` more tokens of each text; returns the texts of finished vectors, by ticket."""
        finished: dict[int, list[Written]] = {}
        for _ in range(tokens):
            self._join()
            if not self._rows:
                break
            self._token(finished)
        return finished

    def _join(self) -> None:
        """Prefill waiting vectors, in order, for as many as the batch has room for."""
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
        prefix = w.prefix.of_words(vectors, ids, strengths)
        cache = w.runner.begin(prefix, w.prefix.positions + w.settings.max_tokens)
        counts = torch.tensor([c for _, _, c in fresh], device=w.device)
        rows = torch.arange(len(fresh), device=w.device).repeat_interleave(counts)
        cache.keep(rows)
        first = w.first_indices[ids][rows]
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
            uniforms = _uniforms(vector, candidates, w.settings.max_tokens)
            self._rows += [_Row(ticket, i, uniforms[i], []) for i in range(candidates)]
            self._done[ticket] = [None] * candidates

    def _token(self, finished: dict[int, list[Written]]) -> None:
        """Write one token of each text; adds finished vectors to `finished`."""
        w, s, rows = self._writer, self._writer.settings, self._rows
        assert self._cache is not None
        scores = w.runner.head(self._state)
        norm = scores.logsumexp(-1)
        steered = scores.clone()
        if s.bonus:
            steered.scatter_add_(1, self._first.clamp_min(0), self._bonus)
        steered[:, w.banned] = -math.inf
        _ban_repeated_trigrams(steered, [row.tokens for row in rows])
        best = steered.argmax(-1)
        sampled = torch.tensor([i for i, row in enumerate(rows) if row.candidate], dtype=torch.int64)
        if len(sampled):
            top, at = (steered[sampled] / s.temperature).topk(min(s.top_k, steered.shape[1]))
            drawing = [rows[i] for i in sampled.tolist()]
            numbers = [row.uniforms[min(len(row.tokens), s.max_tokens - 1)] for row in drawing]
            uniforms = torch.tensor(numbers, device=w.device)[:, None]
            drawn = (top.softmax(-1).cumsum(-1) < uniforms).sum(-1).clamp_max(at.shape[1] - 1)
            best[sampled] = at.gather(1, drawn[:, None])[:, 0]
        logs = (scores.gather(1, best[:, None])[:, 0] - norm).tolist()
        for row, token, log in zip(rows, best.tolist(), logs, strict=True):
            if row.done:
                continue
            row.log_prob += log
            if token != w.end_index:
                row.tokens.append(token)
            if token == w.end_index or len(row.tokens) == s.max_tokens:
                row.done = True
                texts = self._done[row.ticket]
                texts[row.candidate] = w.finished(row.tokens, row.log_prob)
                if None not in texts:
                    finished[row.ticket] = [t for t in self._done.pop(row.ticket) if t is not None]
        going = [i for i, row in enumerate(rows) if not row.done]
        # Shrinking copies the caches, so finished rows stay until there are several, or the cache is full.
        full = int(self._cache.places.max()) == self._cache.own.shape[4]
        if full or len(going) <= len(rows) * (1 - LEAVE_SHARE):
            best = best[going]
            self._keep(going)
        if self._rows:
            self._bonus = self._bonus * (self._first != best[:, None])
            self._state = w.runner.step(self._cache, w.runner.embed(w.prefix.kept[best]))

    def _keep(self, rows: list[int]) -> None:
        """Remove all rows of the batch but these."""
        self._rows = [self._rows[i] for i in rows]
        if self._cache is not None:
            at = torch.tensor(rows, dtype=torch.int64, device=self._writer.device)
            self._cache.keep(at)
            self._state, self._first, self._bonus = self._state[at], self._first[at], self._bonus[at]


def _ban_repeated_trigrams(scores: Tensor, texts: Sequence[Sequence[int]]) -> None:
    """Ban, in place, each token that would repeat a trigram of its text."""
    rows, tokens = [], []
    for row, text in enumerate(texts):
        for i in range(len(text) - 2):
            if text[i : i + 2] == text[-2:]:
                rows.append(row)
                tokens.append(text[i + 2])
    if rows:
        scores[rows, tokens] = -math.inf


def _uniforms(vector: npt.NDArray[np.float32], candidates: int, steps: int) -> npt.NDArray[np.float32]:
    """(C, steps) uniform random numbers, seeded by the vector rounded to three decimals, as in the cache key of
    `lvm.codec.ladder`."""
    digest = hashlib.blake2b(np.rint(vector * 1000).astype(np.int32).tobytes(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "little")).random((candidates, steps), np.float32)
