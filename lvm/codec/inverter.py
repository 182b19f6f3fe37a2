"""The decode engine: vectors to texts, with continuous batching in rounds.

For each row, the hypothesizer writes a first text (or a given text is used) and the text is re-encoded. Each corrector
step then writes a better text from the vector, the text, and the difference of their vectors (vec2text, Morris et al.
2023, arXiv:2310.06816). A *round* advances every row by one step. Between rounds, finished rows leave and new ones
join, so that a stream of requests keeps the batch full.

The generation loop is our own: self-attention caches of fixed length, cross-attention keys and values computed once,
the output table applied to the last position only, and finished rows removed from the batch.

It differs from vec2text in two ways, each a switch of `InverterSettings`: the early stop works, and the best text by
cosine is returned. With both off, and in float32, the token ids are vec2text's.

Letters: B rows, D vector length, T positions, H coordinate pairs (`lvm.codec.mini`), V vocabulary.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from lvm.codec.mini import MiniEncoder, MiniHypothesizer, conjugate, flat, paired, times, unpaired
from lvm.codec.runner import Matrix, Precision, StackRunner, first_largest
from lvm.codec.vec2text import END_ID, START_ID, Corrector, Hypothesizer
from lvm.devices import has_complex
from lvm.errors import InputError

LEAVE_SHARE = 1 / 8
"""Finished rows are removed once they are this share of the batch, as removal copies the caches (about the cost of one
step), while a finished row costs only its part of the products."""

Vectors = npt.NDArray[np.float32]
"""(B, D), or (D,) for one."""
Embed = Callable[[Sequence[str]], Vectors]
"""Texts to (N, D) float32 vectors, not normalised."""
ToTexts = Callable[[Sequence[Sequence[int]]], list[str]]
"""Token ids to texts, without special tokens."""
ToIds = Callable[[Sequence[str]], list[list[int]]]
"""Texts to token ids, truncated to the codec's limit, end token included."""


class Writer(Protocol):
    """A batch of texts being written token by token."""

    def choose(self) -> Tensor:
        """The most likely next token of each row, (B,) int64."""

    def accept(self, ids: Tensor) -> None:
        """Append these tokens, (B,) int64."""

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows, (B',) int64."""


class Hypothesizing(Protocol):
    """Writes first texts."""

    end_id: int

    def writer(self, vectors: Tensor, max_new_tokens: int) -> Writer:
        """Start texts for (B, D) float32 vectors."""


class T5Writer:
    """Greedy generation with vec2text's hypothesizer or corrector."""

    def __init__(
        self, t5: Hypothesizer | Corrector, memory: Tensor, mask: Tensor | None, max_new_tokens: int
    ) -> None:
        self._t5 = t5.t5
        self._cache = self._t5.decoder.begin(memory, mask, max_new_tokens)
        self._previous = torch.full((len(memory),), START_ID, device=memory.device)

    def _state(self) -> Tensor:
        return self._t5.decoder.step(self._cache, F.embedding(self._previous, self._t5.table))

    def choose(self) -> Tensor:
        return self._t5.head.largest(self._state())

    def scores(self) -> Tensor:
        """Log-probabilities of the next token, (B, V) float32."""
        return self._t5.head(self._state()).log_softmax(-1)

    def accept(self, ids: Tensor) -> None:
        self._previous = ids

    def keep(self, rows: Tensor) -> None:
        self._cache.keep(rows)

    def reorder(self, rows: Tensor) -> None:
        """Reorder the self-attention caches to `rows` (B,), within groups of rows that share one memory."""
        self._cache.keep_own(rows)


class Vec2TextHypothesizing:
    """vec2text's hypothesizer, for the engine."""

    end_id = END_ID

    def __init__(self, hypothesizer: Hypothesizer) -> None:
        self._hypothesizer = hypothesizer

    def writer(self, vectors: Tensor, max_new_tokens: int) -> T5Writer:
        return T5Writer(self._hypothesizer, *self._hypothesizer.memory(vectors), max_new_tokens)


FORESEEN_SHARE = 0.5
"""Share of the expected later tokens that is subtracted from the residual before the next token is chosen. BLEU of
first texts of 200 chunks: 70.8 without, 88.4 at 0.4, 88.9 at 0.5, 86.2 at 0.6. Subtracting all of it would give the
gates inputs unlike those of training."""


class MiniHypothesizing:
    """`mini`'s hypothesizer, for the engine."""

    def __init__(
        self,
        hypothesizer: MiniHypothesizer,
        encoder: MiniEncoder,
        end_id: int,
        precision: Precision,
        foresee: Callable[[Tensor], Tensor] | None = None,
        real: bool | None = None,
    ) -> None:
        """foresee: the expected sum of the terms after each position, (B, T, H), from lexical parts (B, H)
        (`Unbinder.foresee`). real: pairs of reals instead of complex numbers; None for only where the device has none.
        """
        self.end_id = end_id
        self.foresee = foresee
        self.network = hypothesizer.float()
        self.runner = StackRunner(hypothesizer.decoder, precision)
        self.table = encoder.tokens.weight.detach().float()
        self.head = Matrix(self.table, precision)  # in float32, shares the encoder's table
        self.real = not has_complex(self.table.device) if real is None else real
        self.binding = encoder.binding(self.real)
        back = conjugate(encoder.rotation.turns(self.real))
        self.back = back[:-1]
        """(T + 1, H): factors that rotate each position back."""
        self.one = paired(self.table.new_tensor([[1.0, 0.0]]), self.real)  # (1, 1)
        self.views = torch.stack((back[:-1], back[1:], self.one.expand_as(back[1:])), dim=1)
        """(T + 1, 3, H): factors of the glimpse's three parts: rotated back by the position, by the next, unrotated."""
        # Columns in the memory order of complex numbers.
        by_pairs = hypothesizer.glimpse.weight.detach().unflatten(1, (3, 2, -1)).transpose(2, 3).flatten(1)
        self.glimpse = Matrix(by_pairs, precision)
        self.remember = Matrix(hypothesizer.memory.weight, precision)

    def writer(self, vectors: Tensor, max_new_tokens: int) -> "MiniWriter":
        return MiniWriter(self, vectors, max_new_tokens)


class MiniWriter:
    """Greedy generation with `mini`: the terms of the tokens written so far are subtracted from the lexical part.

    The same function as `MiniHypothesizer.forward`, on complex pairs, in a third of the calls. In addition, part of the
    expected later terms is subtracted before the priors are computed, to which they would be noise.
    """

    def __init__(self, parts: MiniHypothesizing, vectors: Tensor, max_new_tokens: int) -> None:
        c = parts.network.config
        self._parts = parts
        self._place = 0
        memory = parts.remember(vectors).view(-1, c.memory_tokens, c.lexical_dim)
        self._cache = parts.runner.begin(memory, None, max_new_tokens)
        lexical = paired(parts.network.unscale(vectors), parts.real)  # (B, H)
        self._residual = lexical
        self._after = None if parts.foresee is None else FORESEEN_SHARE * parts.foresee(lexical)
        # The priors' inputs: the lexical part, and the residual minus expected later terms
        self._prior_inputs = torch.stack((lexical, lexical), dim=1)  # (B, 2, H)
        self._previous = vectors.new_zeros(len(vectors), c.lexical_dim)

    def choose(self) -> Tensor:
        parts, t = self._parts, self._place
        network, c = parts.network, parts.network.config
        glimpse = flat(times(self._residual[:, None], parts.views[t])).flatten(1)
        x = parts.glimpse(glimpse).add_(self._previous, alpha=c.lexical_dim**0.5)
        state = parts.runner.step(self._cache, x)
        gates = network.gates(state)  # (B, 4), in the order of `MiniHypothesizer.priors`
        gates = gates[..., None, None] if parts.real else gates[..., None]
        inputs = self._prior_inputs
        inputs[:, 1] = self._residual if self._after is None else self._residual - self._after[:, t]
        prior = times(gates[:, :2] * parts.back[t] + gates[:, 2:] * parts.one, inputs).sum(1)
        scores, scale = parts.head.unscaled(state + unpaired(prior))
        return first_largest(torch.addcmul(network.bias, scores, scale))

    def accept(self, ids: Tensor) -> None:
        parts = self._parts
        self._previous = parts.table[ids]
        self._residual = self._residual - times(
            paired(self._previous, parts.real), parts.binding[self._place]
        )
        self._place += 1

    def keep(self, rows: Tensor) -> None:
        self._cache.keep(rows)
        self._prior_inputs, self._residual = self._prior_inputs[rows], self._residual[rows]
        if self._after is not None:
            self._after = self._after[rows]


@torch.inference_mode()
def write(writer: Writer, num_rows: int, max_new_tokens: int, end_id: int) -> list[list[int]]:
    """Greedy token ids of each row, end token included if the text has one."""
    texts: list[list[int]] = [[] for _ in range(num_rows)]
    running = list(range(num_rows))
    going = torch.ones(num_rows, dtype=torch.bool)
    for _ in range(max_new_tokens if num_rows else 0):
        chosen = writer.choose()
        ids = chosen.cpu()
        for row, token, goes in zip(running, ids.tolist(), going.tolist(), strict=True):
            if goes:
                texts[row].append(token)
        going &= ids != end_id
        num_going = int(going.sum())
        if num_going == 0:
            break
        if num_going <= len(running) * (1 - LEAVE_SHARE):
            rows = going.nonzero()[:, 0]
            running = [running[i] for i in rows.tolist()]
            going = going[rows]
            rows = rows.to(chosen.device)
            writer.keep(rows)
            chosen = chosen[rows]
        writer.accept(chosen)
    return texts


def hypothesize(
    encoder: MiniEncoder,
    hypothesizer: MiniHypothesizer,
    vectors: Tensor,
    end_id: int,
    precision: Precision = "float32",
) -> list[list[int]]:
    """Greedy token ids of (B, D) float32 unit vectors, from `mini`'s networks."""
    limit = hypothesizer.config.max_tokens
    with torch.inference_mode():
        parts = MiniHypothesizing(hypothesizer, encoder, end_id, precision)
        return write(parts.writer(vectors, limit), len(vectors), limit, end_id)


@torch.inference_mode()
def write_with_beams(
    writer: T5Writer, num_vectors: int, width: int, max_new_tokens: int, end_id: int, device: torch.device
) -> list[list[list[int]]]:
    """Token ids of the `width` likeliest texts of each vector, best first, by beam search as in transformers 5.23
    (GenerationMixin._beam_search with early_stopping=False).

    The writer's rows are the beams, `width` in a row for each vector. Scores are mean log-probabilities (length penalty
    1); a vector is done when all its beams have ended and no running one can still win.
    """
    worst = -1.0e9
    shape = (num_vectors, width)
    running = torch.zeros(*shape, 0, dtype=torch.int64, device=device)
    running_scores = torch.full(shape, worst, device=device)
    running_scores[:, 0] = 0.0  # all beams start equal, so only the first may continue
    ended = torch.full((*shape, max_new_tokens), -1, dtype=torch.int64, device=device)
    ended_scores = torch.full(shape, worst, device=device)
    has_ended = torch.zeros(shape, dtype=torch.bool, device=device)
    can_improve = torch.ones(num_vectors, 1, dtype=torch.bool, device=device)
    offset = torch.arange(num_vectors, device=device)[:, None] * width
    for t in range(max_new_tokens):
        scores = writer.scores()
        V = scores.shape[-1]
        total = (scores.view(*shape, V) + running_scores[..., None]).flatten(1)
        # Twice the width, so that `width` beams continue even if as many end here.
        top_scores, top = total.topk(2 * width)
        parents, tokens = top // V, top % V
        texts = torch.cat((_pick(running, parents), tokens[..., None]), dim=-1)
        stops = (tokens == end_id) | (t + 1 == max_new_tokens)

        next_scores = top_scores + stops * worst
        going = next_scores.topk(width).indices
        running, running_scores = _pick(texts, going), _pick(next_scores, going)

        final = top_scores / (t + 1)
        eligible = stops & (torch.arange(2 * width, device=device) < width)
        final = final + ~can_improve * worst + ~eligible * worst
        padded = F.pad(texts, (0, max_new_tokens - t - 1), value=-1)
        merged_scores = torch.cat((ended_scores, final), dim=1)
        best = merged_scores.topk(width).indices
        ended = _pick(torch.cat((ended, padded), dim=1), best)
        ended_scores = _pick(merged_scores, best)
        has_ended = _pick(torch.cat((has_ended, eligible), dim=1), best)

        bound = torch.where(has_ended, ended_scores.min(1, keepdim=True).values, worst)
        can_improve &= (running_scores[:, :1] / (t + 1) > bound).any(1, keepdim=True)
        if not bool(can_improve.any()) or bool(stops.all()):
            break
        writer.reorder((_pick(parents, going) + offset).flatten())
        writer.accept(running[..., -1].flatten())
    return [[[i for i in beam if i >= 0] for beam in beams] for beams in ended.tolist()]


def _pick(values: Tensor, indices: Tensor) -> Tensor:
    """values (B, N, …) at indices (B, M) of the second axis, (B, M, …)."""
    rows = torch.arange(len(values), device=values.device)[:, None]
    return values[rows, indices]


@dataclass(frozen=True)
class Request:
    """One vector to turn into text."""

    vector: Vectors
    """(D,), of the norm that the decoder was trained on."""
    steps: int = 0
    """Maximum corrector steps."""
    target_cosine: float | None = None
    """Round-trip cosine at which the row is done; None for no such limit."""
    start: str | None = None
    """A text to start from, usually a near neighbour's."""
    start_always: bool = False
    """Whether to use `start` even if the hypothesizer's text encodes closer to the vector."""
    leave_blends: bool = False
    """Whether to stop once the vector is known to be a blend, with the text so far, which may be empty."""


@dataclass(frozen=True)
class Inversion:
    """The text of one vector."""

    text: str
    cosine: float
    """Round-trip cosine: between the vector and that of the text."""
    steps_used: int
    """Corrector steps taken, even if an earlier one gave this text."""
    ids: tuple[int, ...]
    """The text's token ids, end token included if it has one."""
    no_text: bool = False
    """True if the vector was found to be a blend, such as a prediction."""


@dataclass(frozen=True)
class Correction:
    """Result of a corrector step for one row."""

    ids: list[int]
    """Token ids of the better text."""
    no_text: bool = False
    """True if the vector was found to be a blend, so that more steps are useless."""


@dataclass(frozen=True)
class InverterSettings:
    """Stopping rules, and the size of the batch."""

    keep_best: bool = True
    """Return the best text by cosine; vec2text without a beam returns the last."""
    stop_early: bool = True
    """Stop a row when a step gains less than `min_gain`; vec2text's own early stop never triggers."""
    min_gain: float = 1e-3
    """Minimum gain in cosine, vec2text's tolerance."""
    beam_fills_with_end: bool = False
    """Pad shorter beams with end tokens, which the corrector then reads, as vec2text does under transformers 5."""
    max_rows: int = 128
    """Maximum rows in the batch; more wait. Two cores gain nothing from a larger one (tests/bench/results)."""

    def __post_init__(self) -> None:
        if self.max_rows < 1:
            raise InputError(f"max_rows is {self.max_rows}; expected 1 or more")


@dataclass
class _Row:
    ticket: int
    request: Request
    ids: list[int] = field(default_factory=list)
    text: str = ""
    vector: Vectors | None = None
    cosine: float = -2.0
    best: tuple[float, str, tuple[int, ...]] = (-2.0, "", ())
    steps_used: int = 0
    no_text: bool = False
    done: bool = False


class Inverter:
    """The decoder of a codec: hypothesizer, corrector if any, and the encoder to check texts."""

    def __init__(
        self,
        hypothesizer: Hypothesizing,
        corrector: Corrector | None,
        embed: Embed,
        to_texts: ToTexts,
        to_ids: ToIds,
        max_new_tokens: int,
        device: torch.device | None = None,
        settings: InverterSettings | None = None,
    ) -> None:
        """max_new_tokens: maximum tokens of a text, end token included, start token not."""
        self.settings = settings or InverterSettings()
        self.hypothesizer = hypothesizer
        self.corrector = corrector
        self.max_new_tokens = max_new_tokens
        self.device = device or torch.device("cpu")
        self._embed = embed
        self._to_texts = to_texts
        self._to_ids = to_ids

    def invert(
        self,
        vectors: Vectors,
        steps: int | Sequence[int] = 0,
        target_cosine: float | None = None,
        starts: Sequence[str | None] | None = None,
        start_always: bool = False,
    ) -> list[Inversion]:
        """Texts of (B, D) vectors, in order. steps: for all rows or per row; the other parameters as in `Request`.

        Raises InputError when a row needs a corrector and there is none, or counts do not match.
        """
        all_steps = [steps] * len(vectors) if isinstance(steps, int) else list(steps)
        all_starts = list(starts) if starts is not None else [None] * len(vectors)
        if len(all_steps) != len(vectors) or len(all_starts) != len(vectors):
            raise InputError(
                f"got {len(all_steps)} step counts and {len(all_starts)} starts for {len(vectors)} vectors; "
                "expected one for each"
            )
        rounds = Rounds(self)
        tickets = [
            rounds.add(Request(v, s, target_cosine, start, start_always))
            for v, s, start in zip(vectors, all_steps, all_starts, strict=True)
        ]
        done: dict[int, Inversion] = {}
        while len(rounds):
            done.update(rounds.run())
        return [done[ticket] for ticket in tickets]

    def invert_with_beam(self, vectors: Vectors, steps: int, width: int) -> list[Inversion]:
        """vec2text's sequence beam search: the `width` distinct texts nearest by cosine go on to the next step.

        Each of a vector's texts is corrected by a token beam of the same width. Raises InputError without a corrector,
        or when steps or width are below 1.
        """
        corrector = self._t5_corrector(steps)
        if steps < 1 or width < 1:
            raise InputError(f"got {steps} steps and a beam of {width}; expected 1 or more of each")
        size = max(1, self.settings.max_rows // width)
        parts = [vectors[low : low + size] for low in range(0, len(vectors), size)]
        return [inversion for part in parts for inversion in self._beam_batch(corrector, part, steps, width)]

    def _beam_batch(self, corrector: Corrector, vectors: Vectors, steps: int, width: int) -> list[Inversion]:
        B = len(vectors)
        ids = self.hypothesize(vectors)
        texts = self._to_texts(ids)
        first = zip(ids, texts, self._embed(texts), strict=True)
        kept: list[list[_Candidate]] = [[(float("nan"), *parts)] for parts in first]
        longest = 0
        for step in range(steps):
            found: list[list[_Candidate]] = [[] for _ in range(B)]
            for parent in range(max(len(rows) for rows in kept)):
                having = [row for row in range(B) if parent < len(kept[row])]
                own = np.stack([kept[row][parent][3] for row in having])
                ids = [kept[row][parent][1] for row in having]
                padded = [i + [END_ID] * (longest - len(i)) for i in ids]
                beams = self._correct_with_beam(corrector, vectors[having], own, padded, width)
                flat = [ids for beam in beams for ids in beam]
                written = self._to_texts(flat)
                embedded = self._embed(written)
                nearness = _cosines(np.repeat(vectors[having], width, axis=0), embedded)
                for n, row in enumerate(having):
                    at = range(n * width, (n + 1) * width)
                    found[row] += [(float(nearness[i]), flat[i], written[i], embedded[i]) for i in at]
            if self.settings.beam_fills_with_end:
                longest = max(len(ids) for candidates in found for _, ids, _, _ in candidates)
            num_kept = width if step + 1 < steps else 1
            kept = [_nearest_different(candidates, num_kept) for candidates in found]
        return [Inversion(text, cosine, steps, tuple(ids)) for ((cosine, ids, text, _),) in kept]

    @torch.inference_mode()
    def _correct_with_beam(
        self, corrector: Corrector, vectors: Vectors, own: Vectors, hypotheses: list[list[int]], width: int
    ) -> list[list[list[int]]]:
        parts = corrector.memory(self._tensor(vectors), self._tensor(own), hypotheses)
        memory, mask = (part.repeat_interleave(width, 0) for part in parts)
        writer = T5Writer(corrector, memory, mask, self.max_new_tokens)
        return write_with_beams(writer, len(vectors), width, self.max_new_tokens, END_ID, self.device)

    @torch.inference_mode()
    def hypothesize(self, vectors: Vectors) -> list[list[int]]:
        """Token ids of the first texts of (B, D) vectors."""
        writer = self.hypothesizer.writer(self._tensor(vectors), self.max_new_tokens)
        return write(writer, len(vectors), self.max_new_tokens, self.hypothesizer.end_id)

    def blends(self, vectors: Vectors) -> npt.NDArray[np.bool_]:
        """(B,) True for vectors (B, D) that are recognised as blends before anything is written."""
        return np.zeros(len(vectors), np.bool_)

    @torch.inference_mode()
    def correct(
        self, vectors: Vectors, own: Vectors, hypotheses: Sequence[Sequence[int]]
    ) -> list[Correction]:
        """One corrector step for (B, D) vectors, from hypotheses (token ids) and their vectors `own` (B, D)."""
        corrector = self._t5_corrector(1)
        memory, mask = corrector.memory(self._tensor(vectors), self._tensor(own), hypotheses)
        writer = T5Writer(corrector, memory, mask, self.max_new_tokens)
        return [Correction(ids) for ids in write(writer, len(vectors), self.max_new_tokens, END_ID)]

    def _tensor(self, vectors: Vectors) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(vectors, np.float32)).to(self.device)

    @property
    def can_correct(self) -> bool:
        """Whether `correct` can be called."""
        return self.corrector is not None

    def require_correcting(self, steps: int) -> None:
        """Raise InputError, naming `steps`, if there is no corrector."""
        if not self.can_correct:
            raise InputError(
                f"this codec has a hypothesizer and no corrector: expected steps 0, got {steps}; "
                "ask for 0 steps or load a codec with a corrector"
            )

    def _t5_corrector(self, steps: int) -> Corrector:
        self.require_correcting(steps)
        assert self.corrector is not None
        return self.corrector


def _cosines(a: Vectors, b: Vectors) -> Vectors:
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.asarray((a * b).sum(1) / np.maximum(norms, np.finfo(np.float32).tiny), np.float32)


_Candidate = tuple[float, list[int], str, Vectors]
"""A text in the beam: cosine, token ids, text, the text's vector."""


def _nearest_different(candidates: list[_Candidate], number: int) -> list[_Candidate]:
    """The `number` candidates with the highest cosines and distinct token ids, or all if fewer."""
    kept: dict[tuple[int, ...], _Candidate] = {}
    for candidate in sorted(candidates, key=lambda c: -c[0]):
        kept.setdefault(tuple(candidate[1]), candidate)
        if len(kept) == number:
            break
    return list(kept.values())


class Rounds:
    """The batch of rows being decoded."""

    def __init__(self, inverter: Inverter, scale: float = 1.0) -> None:
        """scale: norm of the vectors that the decoder was trained on, to which `read` scales unit vectors."""
        self._inverter, self._scale = inverter, np.float32(scale)
        self._waiting: deque[_Row] = deque()
        self._inside: list[_Row] = []
        self._next_ticket = 0

    def __len__(self) -> int:
        """Number of unfinished rows, including waiting ones."""
        return len(self._waiting) + len(self._inside)

    def add(self, request: Request) -> int:
        """Queue a vector, which joins at the next round with room; returns its ticket.

        Raises InputError on a negative number of steps, and on steps without a corrector.
        """
        if request.steps < 0:
            raise InputError(f"got {request.steps} steps; expected 0 or more")
        if request.steps:
            self._inverter.require_correcting(request.steps)
        ticket = self._next_ticket
        self._next_ticket += 1
        self._waiting.append(_Row(ticket, request))
        return ticket

    def read(self, vector: Vectors, steps: int, leave_blends: bool) -> int:
        """`add` for a unit vector (D,)."""
        return self.add(Request(vector * self._scale, steps, leave_blends=leave_blends))

    def drop(self, ticket: int) -> bool:
        """Cancel a row; returns False if it has finished."""
        before = len(self)
        self._waiting = deque(row for row in self._waiting if row.ticket != ticket)
        self._inside = [row for row in self._inside if row.ticket != ticket]
        return len(self) < before

    def inside(self) -> dict[int, Inversion]:
        """Current result of each row in the batch, by ticket."""
        return {row.ticket: self._result(row) for row in self._inside}

    def run(self) -> dict[int, Inversion]:
        """Run one round: first texts for the rows that join, then one corrector step for each unfinished row. Returns
        the finished rows, by ticket."""
        room = self._inverter.settings.max_rows - len(self._inside)
        fresh = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
        self._inside += fresh
        if leaving_blends := [row for row in fresh if row.request.leave_blends]:
            blends = self._inverter.blends(np.stack([row.request.vector for row in leaving_blends]))
            for row, is_blend in zip(leaving_blends, blends.tolist(), strict=True):
                row.no_text = row.done = is_blend
        self._write([row for row in fresh if not row.done])
        if unfinished := [row for row in self._inside if not row.done]:
            self._step(unfinished)
        finished = {row.ticket: self._result(row) for row in self._inside if row.done}
        self._inside = [row for row in self._inside if not row.done]
        return finished

    def _write(self, fresh: list[_Row]) -> None:
        """First texts: given, or the hypothesizer's."""
        inverter = self._inverter
        given = [row for row in fresh if row.request.start is not None]
        written = [row for row in fresh if row.request.start is None or not row.request.start_always]
        candidates: list[tuple[_Row, list[int]]] = []
        if given:
            ids = inverter._to_ids([row.request.start or "" for row in given])
            # The corrector reads at most max_new_tokens.
            candidates += [(row, i[: inverter.max_new_tokens]) for row, i in zip(given, ids, strict=True)]
        if written:
            ids = inverter.hypothesize(np.stack([row.request.vector for row in written]))
            candidates += list(zip(written, ids, strict=True))
        if candidates:
            self._measure([row for row, _ in candidates], [ids for _, ids in candidates])
        for row in fresh:
            row.done = row.request.steps == 0 or self._reached(row)

    def _step(self, rows: list[_Row]) -> None:
        """One corrector step for each row."""
        vectors = np.stack([row.request.vector for row in rows])
        own = np.stack([row.vector for row in rows if row.vector is not None])
        found = self._inverter.correct(vectors, own, [row.ids for row in rows])
        before = [row.best[0] for row in rows]
        self._measure(rows, [c.ids for c in found], replace=True)
        for row, last_best, correction in zip(rows, before, found, strict=True):
            row.steps_used += 1
            row.no_text = correction.no_text
            gained = row.cosine >= last_best + self._inverter.settings.min_gain
            stuck = self._inverter.settings.stop_early and (correction.no_text or not gained)
            leaves = row.request.leave_blends and correction.no_text
            row.done = stuck or leaves or row.steps_used >= row.request.steps or self._reached(row)

    def _measure(self, rows: list[_Row], ids: list[list[int]], replace: bool = False) -> None:
        """Encode texts, one per row. A row takes its text if it encodes closer to the vector, or always (`replace`)."""
        texts = self._inverter._to_texts(ids)
        # An unchanged text keeps its vector.
        changed = [i for i, row in enumerate(rows) if texts[i] != row.text or row.vector is None]
        vectors = self._inverter._embed([texts[i] for i in changed]) if changed else ()
        again = dict(zip(changed, vectors, strict=True))
        for i, row in enumerate(rows):
            vector = again.get(i, row.vector)
            assert vector is not None
            cosine = float(_cosines(row.request.vector[None], vector[None])[0])
            if replace or cosine > row.cosine:
                row.ids, row.text, row.vector, row.cosine = ids[i], texts[i], vector, cosine
            if cosine > row.best[0]:
                row.best = (cosine, texts[i], tuple(ids[i]))

    @staticmethod
    def _reached(row: _Row) -> bool:
        target = row.request.target_cosine
        return target is not None and row.best[0] >= target

    def _result(self, row: _Row) -> Inversion:
        last = (row.cosine, row.text, tuple(row.ids))
        cosine, text, ids = row.best if self._inverter.settings.keep_best else last
        return Inversion(text, cosine, row.steps_used, ids, row.no_text)
