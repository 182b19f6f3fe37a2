"""`mini`'s corrector step: re-reads each word and its position with the interference of all others removed.

The lexical part of a vector is x = sum_t A_t e(token at t), A_t = w + o R_t (see `lvm.codec.mini`). To the
hypothesizer, which writes from left to right, all words still to come are noise, so it errs early in a text. Here a
complete hypothesis exists, so the contribution of all *other* positions can be subtracted before a position is read
again. It needs no weights except the codec's token table. Three parts:

- Sweeps over the places. Each place gets a softmax over the vocabulary of the matched filter's score, over an
  assumed noise variance that falls from sweep to sweep, plus the log prior of the piece and of "no token here".
  What the others' *mean* embeddings explain is taken off first, so doubt stays doubt and early errors can still be
  undone. This is iterative soft decoding of sparse superposition codes (Barron & Joseph 2012, arXiv:1006.3780; Rush,
  Greig & Venkataramanan 2017, arXiv:1501.05892), with the hypothesis as a prior.
- Swaps. Two transposed tokens are a local optimum of single-position updates, as their word parts do not depend on
  position; the most useful swap is applied until none helps.
- A text is taken only when it explains more of x than the hypothesis does, and so much that the vector can be a text's.
  A predicted vector is a blend of many texts, and words fitted to it place by place are no sentence.
- Such a vector is left to a writer (`lvm.codec.writer`). Many are recognised after one soft sweep, before anything
  is written.

The coordinate pairs that a rotation turns are held as complex numbers here (`lvm.codec.mini.paired`; as two reals where
a device has none), so that turning, and all of A_t, is one product: A_t e is (w + o r_t) e, its transpose the
conjugate's, and inner products are the real parts'. For a few rows the cost of a sweep is in the number of calls.

Letters: B batch, T places, L = 512 (words and order), H = L/2 of its pairs, V vocabulary; id V stands for "no token
here".
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from lvm.codec.inverter import Correction, Embed, Inversion, Inverter, MiniHypothesizing, ToIds, ToTexts
from lvm.codec.mini import (
    MiniEncoder,
    MiniHypothesizer,
    conjugate,
    flat,
    paired,
    square,
    times,
    unflat,
)
from lvm.codec.runner import ARGMAX_BLOCK, Matrix, Precision, first_largest
from lvm.devices import has_complex
from lvm.errors import InputError

HOT, COLD = 0.1, 0.01
"""Assumed noise variance a coordinate in the first and in the last sweep, in units of one token's embedding: about
that of all other tokens together (26 * 1.64 / 512 = 0.08), and well above what rounding to float16 leaves."""

SWEEPS = 4
"""Sweeps from hot to cold."""

NOISES = tuple(HOT * (COLD / HOT) ** (sweep / (SWEEPS - 1)) for sweep in range(SWEEPS))
"""Assumed noise variance of each sweep."""

TOGETHER = 2
"""Positions updated in parallel from the second sweep on: half the calls for the few rows that get
so far. With 2 one step's BLEU on 600 chunks stays (98.1 and 97.8, at cosine 0.9 83.7 and 83.5); with 4
it is 97.9 and 81.2, with 8 96.0 and 75.1, and in the first sweep 2 already cost 2 % of the exact texts (LOG.md)."""

SOLVED = 0.002
"""Unexplained share of x under which nothing is left to correct."""

NO_TEXT = 0.42
"""Unexplained share of x above which the vector encodes no text. At cosine 0.9 from a text's vector about
0.30 stays unexplained and correcting helps; at 0.8 it is 0.45 and does not (tests/bench/results)."""

BLEND = 0.19
"""Energy that the places of a soft sweep hold one by one, as a share of the vector's, below which the vector is a
blend. Words of a text are nearly orthogonal, and each place holds one of them: the least of 1,500 texts' own vectors
has 0.30, of the same at cosine 0.95 0.20. In a prediction all places hold some of the same average, which adds up where
words do not: 98 of 100 have less than 0.19, the median 0.10 (LOG.md)."""

HOPELESS = (0.55, 0.50, 0.46)
"""Unexplained share after the first, second and third sweep above which a row is treated as a blend and dropped: of 288
vectors, texts' own and with noise down to cosine 0.8, none that started higher ended below `NO_TEXT` (LOG.md)."""

LEAST_GAIN = 1e-3
"""Energy a swap must explain, in units of one token's embedding: above float32's rounding of such sums."""

HYPOTHESIS_SHARE = 0.5
"""Prior that the hypothesis is right at a place; the other half follows the pieces' frequencies."""


class Unbinder:
    """Better texts for vectors from first texts, by explaining away in both directions."""

    def __init__(
        self,
        encoder: MiniEncoder,
        hypothesizer: MiniHypothesizer,
        log_frequencies: Sequence[float],
        end_id: int,
        precision: Precision = "float32",
        real: bool | None = None,
    ) -> None:
        """log_frequencies: of the V pieces in running text, nats. precision: of the large products. real: pairs as two
        reals and not as complex numbers; None where the device has no complex numbers."""
        c = encoder.config
        self._hypothesizer = hypothesizer
        self._end_id = end_id
        self._order = c.order_weight
        self.num_places = T = c.max_tokens
        self.nothing = c.vocabulary_size
        table = encoder.tokens.weight.detach().float()
        self._real = not has_complex(table.device) if real is None else real
        self._table = self._paired(torch.cat((table, table.new_zeros(1, c.lexical_dim))))  # (V + 1, H)
        # Padded for `first_largest`; padding never wins.
        filling = -(c.vocabulary_size + 1) % ARGMAX_BLOCK
        full = F.pad(flat(self._table), (0, 0, 0, filling))
        self._to_pieces = Matrix(full, precision)
        self._of_pieces = Matrix(full.T.contiguous(), precision)
        self._turns = encoder.rotation.turns(self._real)[:T]  # (T, H)
        self._back = conjugate(self._turns)
        self._binding = encoder.binding(self._real)[:T]  # A_t, (T, H)
        self._matching = conjugate(self._binding)  # its transpose
        # |A_t e|^2 of each place and piece, (T, V + 1)
        energies = square(self._binding) @ square(self._table).T
        # Prior that a position is empty, growing with position; roughly that of chunks cut at max_tokens.
        empty = 0.01 + 0.9 * (torch.arange(T, device=table.device) / T) ** 2
        self._log_prior = torch.tensor([*log_frequencies, 0.0]).to(table).repeat(T, 1)  # (T, V + 1)
        self._log_prior[:, -1] = empty.log()
        # What a sweep adds to the matched filter's scores over its noise, (SWEEPS, T, V + 1 and what fills)
        offsets = torch.stack([self._log_prior - 0.5 * energies / noise for noise in NOISES])
        self._offsets = F.pad(offsets, (0, filling), value=float("-inf"))
        usual = self._log_prior.softmax(-1) @ flat(self._table)
        # What a place holds before anything is known, (T, H)
        self._start = times(unflat(usual, self._real), self._binding)
        # cos(d * angle) of each coordinate pair and distance d, (H, T)
        self._cosines = encoder.rotation.cos[:T].T.contiguous()

    def _paired(self, x: Tensor) -> Tensor:
        return paired(x, self._real)

    def _starts(self, B: int) -> Tensor:
        """(B, T, H), overwritten by a sweep."""
        return self._start.expand(B, *self._start.shape).clone()

    def _left(self, x: Tensor, ids: Tensor) -> Tensor:
        """The residual of x (B, H) after subtracting ids (B, T)."""
        return x - times(self._table[ids], self._binding).sum(1)

    def _share(self, x: Tensor, ids: Tensor) -> Tensor:
        """(B,) unexplained share of x's energy."""
        share: Tensor = square(self._left(x, ids)).sum(1) / square(x).sum(1).clamp(min=1e-12)
        return share

    @torch.inference_mode()
    def improve(self, vectors: Tensor, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        """One step: token ids that explain unit vectors (B, D) float32 better than `rows` do, or `rows` again."""
        return self.judge(vectors, rows)[0]

    @torch.inference_mode()
    def judge(self, vectors: Tensor, rows: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[int]]:
        """As `improve`, and the rows whose vector is a blend."""
        if not rows:
            return [], []
        x = self._paired(self._hypothesizer.unscale(vectors))
        ids = self._pack(rows, x.device)
        share = self._share(x, ids)
        todo = torch.nonzero(share > SOLVED)[:, 0]
        no_text = todo[:0]
        if todo.numel():
            found, hopeful = self._sweep(x[todo], ids[todo])
            found[hopeful] = self._settle(x[todo][hopeful], found[hopeful])
            after = self._share(x[todo], found)
            better = (after < share[todo]) & (after < NO_TEXT)
            ids[todo[better]] = found[better]
            no_text = todo[torch.minimum(after, share[todo]) >= NO_TEXT]
        return self._unpack(ids, rows), no_text.tolist()

    def _settle(self, x: Tensor, ids: Tensor) -> Tensor:
        """Swaps, and one more sweep and swaps for the rows (B, T) that these could still bring to a text."""
        ids = self._swap(x, ids)
        share = self._share(x, ids)
        again = torch.nonzero((share > SOLVED) & (share < HOPELESS[-1]))[:, 0]
        if again.numel():  # from the settled result, starting cold
            cold, _ = self._sweep(x[again], ids[again], settled=True)
            ids[again] = self._swap(x[again], cold)
        return ids

    def _sweep(self, x: Tensor, ids: Tensor, settled: bool = False) -> tuple[Tensor, Tensor]:
        """Most probable ids (B, T) after soft sweeps from the hypothesis ids (B, T), and the rows (B',) int64
        that went through all of them: the others were dropped as hopeless.

        settled: begin from what the hypothesis explains, not from the usual text, and sweep once, cold.
        """
        B, T = ids.shape
        mean = times(self._table[ids], self._binding) if settled else self._starts(B)
        left = x - mean.sum(1)
        energy = square(x).sum(1).clamp(min=1e-12)
        found = ids.clone()
        rows = torch.arange(B, device=ids.device)
        known = ids
        for sweep in range(SWEEPS - 1 if settled else 0, SWEEPS):
            prior = self._log_prior.gather(1, known.T).T.exp()
            more = torch.log(HYPOTHESIS_SHARE / prior + 1 - HYPOTHESIS_SHARE)  # (B, T)
            best = torch.empty_like(known)
            together = TOGETHER if sweep else 1
            for t in range(0, T, together):
                at = slice(t, t + together)
                old = mean[:, at]
                scores = self._scores(left[:, None] + old, at, sweep)
                scores.scatter_add_(2, known[:, at, None], more[:, at, None])
                best[:, at] = first_largest(scores.flatten(0, 1)).view(scores.shape[:2])
                here = self._mean(scores, at)
                left = left + (old - here).sum(1)
                mean[:, at] = here
            found[rows] = best
            if sweep < len(HOPELESS):
                hopeful = torch.nonzero(square(left).sum(1) <= HOPELESS[sweep] * energy)[:, 0]
                if len(hopeful) < len(rows):
                    rows, known, mean = rows[hopeful], known[hopeful], mean[hopeful]
                    left, energy = left[hopeful], energy[hopeful]
                if not len(rows):
                    break
        return found, rows

    def _scores(self, alone: Tensor, places: slice, sweep: int) -> Tensor:
        """Log probability of each piece at K places but for a constant, (B, K, V + 1 and what fills); alone (B, K, H)
        is x less what the others hold."""
        B, K = alone.shape[:2]
        matched, scale = self._to_pieces.unscaled(flat(times(alone, self._matching[places])).flatten(0, 1))
        noise = scale.div_(NOISES[sweep]).view(B, K, 1)
        return torch.addcmul(self._offsets[sweep, places], matched.view(B, K, -1), noise)

    def _mean(self, scores: Tensor, places: slice) -> Tensor:
        """What K places hold on average, (B, K, H); scores (B, K, V + 1 and what fills) are overwritten."""
        # Below e^-40 is nothing, and exp is slow where its result is denormal.
        weights = scores.sub_(scores.amax(-1, keepdim=True)).clamp_min_(-40).exp_().flatten(0, 1)
        embedded = self._of_pieces.of_shares(weights).div_(weights.sum(-1, keepdim=True))
        return times(unflat(embedded.view(*scores.shape[:2], -1), self._real), self._binding[places])

    def foresee(self, x: Tensor) -> Tensor:
        """What the places after each probably hold together, (B, T, H), from lexical parts x (B, H) alone; as pairs.

        A writer that subtracts some of it reads its next word against less noise
        (`lvm.codec.inverter.FORESEEN_SHARE`).
        """
        return self._soft_sweep(x)[0]

    @torch.inference_mode()
    def blends(self, vectors: Tensor) -> Tensor:
        """(B,) bool: unit vectors (B, D) float32 that one soft sweep already shows to be blends."""
        x = self._paired(self._hypothesizer.unscale(vectors))
        return self._soft_sweep(x)[1] < BLEND * square(x).sum(1)

    @torch.inference_mode()
    def _soft_sweep(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the places after each hold on average, (B, T, H), and the energy of what each holds, summed, (B,): one
        sweep over x (B, H) from the last place to the first."""
        mean = self._starts(len(x))
        left = x - mean.sum(1)
        after, held = torch.zeros_like(mean), torch.zeros(len(x), device=x.device)
        for t in range(self.num_places - 1, -1, -1):
            at = slice(t, t + 1)
            alone = left[:, None] + mean[:, at]
            here = self._mean(self._scores(alone, at, 0), at)
            left = (alone - here)[:, 0]
            held += square(here[:, 0]).sum(1)
            if t:
                after[:, t - 1] = after[:, t] + here[:, 0]
        return after, held

    def _swap(self, x: Tensor, ids: Tensor, most: int = 8) -> Tensor:
        """ids (B, T) with pairs of places exchanged while that explains more of x, at most `most` pairs per row.

        Exchanging i and j adds d_ij = o (R_i - R_j)(e_j - e_i) to the text's vector, and takes
        2 <left, d_ij> - |d_ij|^2 off the unexplained energy.
        """
        ids = ids.clone()
        B, T = ids.shape
        row = torch.arange(B, device=ids.device)
        apart = (torch.arange(T)[:, None] - torch.arange(T)[None]).abs().to(ids.device).expand(B, T, T)
        for _ in range(most):
            e = self._table[ids]
            real = flat(e)
            left = self._left(x, ids)
            seen = flat(times(left[:, None], self._back)) @ real.transpose(1, 2)  # <R_i^T left, e_j>
            own = seen.diagonal(dim1=1, dim2=2)
            along = self._order * (seen + seen.transpose(1, 2) - own[:, :, None] - own[:, None])
            # |d|^2 = 2 o^2 (|e_j - e_i|^2 - <R_i (e_j - e_i), R_j (e_j - e_i)>); the last term by coordinate pairs,
            # where R_i^T R_j turns by (j - i) angles.
            gram = real @ real.transpose(1, 2)
            norms = gram.diagonal(dim1=1, dim2=2)
            apart2 = norms[:, :, None] + norms[:, None] - 2 * gram
            by_distance = square(e) @ self._cosines  # (B, T, distance)
            single = by_distance.gather(2, apart) + by_distance.gather(2, apart).transpose(1, 2)
            forth, back = flat(times(e, self._turns)), flat(times(e, self._back))
            mixed = forth @ forth.transpose(1, 2) + back @ back.transpose(1, 2)
            gain = 2 * along - 2 * self._order**2 * (apart2 - (single - mixed))
            most_gain, at = gain.flatten(1).max(1)
            go = torch.nonzero(most_gain > LEAST_GAIN)[:, 0]
            if go.numel() == 0:
                break
            i, j = at[go] // T, at[go] % T
            ids[row[go], i], ids[row[go], j] = ids[row[go], j], ids[row[go], i]
        return ids

    def _pack(self, rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
        """ids (B, T), with `nothing` after each row's end."""
        ids = torch.full((len(rows), self.num_places), self.nothing)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(list(row[: self.num_places]), dtype=torch.int64)
        return ids.to(device)

    def _unpack(self, ids: Tensor, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        """Rows of ids up to the first end token; empty places left out, and a row of nothing as it was."""
        out: list[list[int]] = []
        for found, before in zip(ids.tolist(), rows, strict=True):
            stop = found.index(self._end_id) + 1 if self._end_id in found else len(found)
            out.append([i for i in found[:stop] if i != self.nothing] or list(before))
        return out


class UnbindingInverter(Inverter):
    """The decode engine with `mini`'s corrector step in the place of vec2text's."""

    def __init__(
        self,
        hypothesizer: MiniHypothesizing,
        unbinder: Unbinder,
        embed: Embed,
        to_texts: ToTexts,
        to_ids: ToIds,
        max_new_tokens: int,
        device: torch.device,
    ) -> None:
        super().__init__(hypothesizer, None, embed, to_texts, to_ids, max_new_tokens, device)
        self._unbinder = unbinder

    @property
    def can_correct(self) -> bool:
        return True

    def invert_with_beam(self, vectors: npt.NDArray[np.float32], steps: int, width: int) -> list[Inversion]:
        """Raises InputError: a step here returns one text, the one that explains most."""
        raise InputError(
            f"mini's corrector does not support beams, got width {width}; decode without one, or use a GTR codec"
        )

    def correct(
        self,
        vectors: npt.NDArray[np.float32],
        own: npt.NDArray[np.float32],
        hypotheses: Sequence[Sequence[int]],
    ) -> list[Correction]:
        """Better texts for unit vectors (B, D), from hypotheses (ids); `own` is not needed. A blend keeps its
        hypothesis."""
        ids, no_text = self._unbinder.judge(self._tensor(vectors), hypotheses)
        found = [Correction(row) for row in ids]
        for row in no_text:
            found[row] = Correction(ids[row], no_text=True)
        return found

    def blends(self, vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
        found: npt.NDArray[np.bool_] = self._unbinder.blends(self._tensor(vectors)).cpu().numpy()
        return found
