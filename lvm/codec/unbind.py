"""`mini`'s corrector step: decodes each position again, with the interference of all other tokens removed.

The lexical part of a vector is x = sum_t A_t e(token at t), A_t = w + o R_t (`lvm.codec.mini`). The hypothesizer writes
from left to right, so to it all later tokens are noise, and it errs early in a text. A corrector step has a complete
hypothesis, so it can subtract all *other* tokens before it decodes a position. It needs no weights but the codec's
token table.

- Sweeps. Each position in turn gets a softmax over the vocabulary: matched filter score, divided by an assumed noise
  variance that falls from sweep to sweep, plus the log prior of the token, or of none. First the *mean* embeddings
  under the other positions' softmaxes are subtracted, so that uncertain positions subtract little and early errors can
  be undone. This is iterative soft decoding of sparse superposition codes (Barron & Joseph 2012, arXiv:1006.3780; Rush,
  Greig & Venkataramanan 2017, arXiv:1501.05892), with the hypothesis as a prior.
- Swaps. Two transposed tokens are a local optimum of single-position updates, as their unrotated terms do not depend on
  position. So the swap that explains most is applied until none helps.
- Acceptance. The result is kept only if it explains more of x than the hypothesis does, and enough that the vector may
  encode a text. A predicted vector is a blend of many texts, and tokens fitted to it are not a sentence: blends are
  left to a writer (`lvm.codec.writer`). Many are recognised by one soft sweep, before anything is written.

Coordinate pairs are complex numbers here (`lvm.codec.mini.paired`; pairs of reals on devices without them). A_t e is
then one product, (w + o r_t) e, its transpose the product with the conjugate, and an inner product the real part of the
complex one. Fewer calls matter: they dominate the cost of a sweep over few rows.

Letters: B rows, T positions, K positions updated together, L = 512 (lexical), H = L/2, V vocabulary; id V stands for
"no token here".
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from lvm.codec.inverter import Correction, Embed, Inversion, Inverter, MiniHypothesizing, ToIds, ToTexts
from lvm.codec.mini import MiniEncoder, MiniHypothesizer, conjugate, flat, paired, square, times, unflat
from lvm.codec.runner import ARGMAX_BLOCK, Matrix, Precision, first_largest
from lvm.devices import has_complex
from lvm.errors import InputError

HOT, COLD = 0.1, 0.01
"""Assumed noise variance per coordinate in the first and the last sweep, in units of one token's embedding: about that
of all other tokens together (26 * 1.64 / 512 = 0.08), and well above the error of rounding vectors to float16."""

SWEEPS = 4

NOISES = tuple(HOT * (COLD / HOT) ** (sweep / (SWEEPS - 1)) for sweep in range(SWEEPS))
"""Assumed noise variance of each sweep."""

TOGETHER = 2
"""Positions updated in parallel from the second sweep on, in half the calls. BLEU of 600 chunks after one step, exact
and at cosine 0.9: 98.1 and 83.7 with 1, 97.8 and 83.5 with 2, 97.9 and 81.2 with 4, 96.0 and 75.1 with 8. In the first
sweep, 2 would already lose 2 % of the exact texts (LOG.md)."""

SOLVED = 0.002
"""Unexplained share of x's energy below which nothing is left to correct."""

NO_TEXT = 0.42
"""Unexplained share of x's energy above which the vector encodes no text. At cosine 0.9 from a text's vector about 0.30
stays unexplained and correcting helps; at 0.8 it is 0.45 and does not (tests/bench/results)."""

BLEND = 0.19
"""A vector is a blend if the energies of the mean embeddings after a soft sweep add up to less than this share of x's.
The tokens of a text are nearly orthogonal, so their energies add up: the minimum over 1,500 texts' vectors is 0.30, and
0.20 with noise (cosine 0.95). In a prediction the means are all alike, so that they explain x with less energy of their
own: 98 of 100 are below 0.19, the median is 0.10 (LOG.md)."""

HOPELESS = (0.55, 0.50, 0.46)
"""Unexplained share after the first, second and third sweep above which a row is dropped as a blend: of 288 vectors,
texts' own or with noise down to cosine 0.8, none above it ended below `NO_TEXT` (LOG.md)."""

LEAST_GAIN = 1e-3
"""Energy that a swap must explain, in units of one token's embedding: above the float32 rounding of such sums."""

HYPOTHESIS_SHARE = 0.5
"""Prior probability of the hypothesis's token at its position; the rest follows the tokens' frequencies."""


class Unbinder:
    """Finds texts that explain vectors better than given texts do."""

    def __init__(
        self,
        encoder: MiniEncoder,
        hypothesizer: MiniHypothesizer,
        log_frequencies: Sequence[float],
        end_id: int,
        precision: Precision = "float32",
        real: bool | None = None,
    ) -> None:
        """log_frequencies: of the V tokens in running text, nats. precision: of the products with the token table.
        real: pairs of reals instead of complex numbers; None for only where the device has none."""
        c = encoder.config
        self._hypothesizer = hypothesizer
        self._end_id = end_id
        self._order = c.order_weight
        self.num_places = T = c.max_tokens
        self.nothing = c.vocabulary_size
        table = encoder.tokens.weight.detach().float()
        self._real = not has_complex(table.device) if real is None else real
        full_table = torch.cat((table, table.new_zeros(1, c.lexical_dim)))
        self._table = paired(full_table, self._real)  # (V + 1, H)
        padding = -(c.vocabulary_size + 1) % ARGMAX_BLOCK  # for `first_largest`; scores -inf below
        full = F.pad(flat(self._table), (0, 0, 0, padding))
        self._to_pieces = Matrix(full, precision)
        self._of_pieces = Matrix(full.T.contiguous(), precision)
        self._turns = encoder.rotation.turns(self._real)[:T]  # (T, H)
        self._back = conjugate(self._turns)
        self._binding = encoder.binding(self._real)[:T]  # A_t, (T, H)
        self._matching = conjugate(self._binding)  # the transpose of A_t
        # |A_t e|^2 of each position and token, (T, V + 1)
        energies = square(self._binding) @ square(self._table).T
        # Prior that a position is empty, growing with position: roughly that of chunks cut at max_tokens.
        empty = 0.01 + 0.9 * (torch.arange(T, device=table.device) / T) ** 2
        self._log_prior = torch.tensor([*log_frequencies, 0.0]).to(table).repeat(T, 1)  # (T, V + 1)
        self._log_prior[:, -1] = empty.log()
        # Added to matched filter scores / noise: log prior - |A_t e|^2 / (2 noise), (SWEEPS, T, padded V + 1)
        offsets = torch.stack([self._log_prior - 0.5 * energies / noise for noise in NOISES])
        self._offsets = F.pad(offsets, (0, padding), value=float("-inf"))
        # Mean term of each position under the prior, (T, H)
        prior_mean = self._log_prior.softmax(-1) @ flat(self._table)
        self._start = times(unflat(prior_mean, self._real), self._binding)
        # cos(d * angle) of each coordinate pair and distance d, (H, T)
        self._cosines = encoder.rotation.cos[:T].T.contiguous()

    def _lexical(self, vectors: Tensor) -> Tensor:
        """The lexical parts of unit vectors (B, D), as pairs, (B, H)."""
        return paired(self._hypothesizer.unscale(vectors), self._real)

    def _starts(self, B: int) -> Tensor:
        """(B, T, H), to be overwritten by a sweep."""
        return self._start.expand(B, *self._start.shape).clone()

    def _left(self, x: Tensor, ids: Tensor) -> Tensor:
        """The residual of x (B, H) after subtracting the tokens ids (B, T)."""
        return x - times(self._table[ids], self._binding).sum(1)

    def _share(self, x: Tensor, ids: Tensor) -> Tensor:
        """(B,) share of x's energy that the tokens ids (B, T) leave unexplained."""
        share: Tensor = square(self._left(x, ids)).sum(1) / square(x).sum(1).clamp(min=1e-12)
        return share

    @torch.inference_mode()
    def judge(self, vectors: Tensor, rows: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[int]]:
        """One corrector step: token ids that explain unit vectors (B, D) float32 better than `rows` do, else `rows`;
        and the numbers of the rows whose vector is a blend."""
        if not rows:
            return [], []
        x = self._lexical(vectors)
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
        """ids (B, T) after swaps; rows neither solved nor hopeless also get one more cold sweep, and swaps again."""
        ids = self._swap(x, ids)
        share = self._share(x, ids)
        again = torch.nonzero((share > SOLVED) & (share < HOPELESS[-1]))[:, 0]
        if again.numel():
            swept, _ = self._sweep(x[again], ids[again], last_only=True)
            ids[again] = self._swap(x[again], swept)
        return ids

    def _sweep(self, x: Tensor, ids: Tensor, last_only: bool = False) -> tuple[Tensor, Tensor]:
        """Most probable ids (B, T) after soft sweeps with the hypothesis ids (B, T) as a prior, and the numbers (B',)
        int64 of the rows that were not dropped as hopeless.

        last_only: do only the last, coldest sweep, starting from the hypothesis's terms instead of the prior's means.
        """
        B, T = ids.shape
        mean = times(self._table[ids], self._binding) if last_only else self._starts(B)
        left = x - mean.sum(1)
        energy = square(x).sum(1).clamp(min=1e-12)
        found = ids.clone()
        rows = torch.arange(B, device=ids.device)
        known = ids
        for sweep in range(SWEEPS - 1 if last_only else 0, SWEEPS):
            prior = self._log_prior.gather(1, known.T).T.exp()
            bonus = torch.log(HYPOTHESIS_SHARE / prior + 1 - HYPOTHESIS_SHARE)  # (B, T)
            best = torch.empty_like(known)
            together = TOGETHER if sweep else 1
            for t in range(0, T, together):
                at = slice(t, t + together)
                old = mean[:, at]
                scores = self._scores(left[:, None] + old, at, sweep)
                scores.scatter_add_(2, known[:, at, None], bonus[:, at, None])
                best[:, at] = first_largest(scores.flatten(0, 1)).view(scores.shape[:2])
                new = self._mean(scores, at)
                left = left + (old - new).sum(1)
                mean[:, at] = new
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
        """Log-probability of each token at K positions, up to a constant, (B, K, padded V + 1); alone (B, K, H) is x
        minus the mean terms of all other positions."""
        B, K = alone.shape[:2]
        matched, scale = self._to_pieces.unscaled(flat(times(alone, self._matching[places])).flatten(0, 1))
        noise = scale.div_(NOISES[sweep]).view(B, K, 1)
        return torch.addcmul(self._offsets[sweep, places], matched.view(B, K, -1), noise)

    def _mean(self, scores: Tensor, places: slice) -> Tensor:
        """Mean terms of K positions, (B, K, H), from scores (B, K, padded V + 1), which are overwritten."""
        # Below e^-40 does not matter, and exp is slow where its result is denormal.
        weights = scores.sub_(scores.amax(-1, keepdim=True)).clamp_min_(-40).exp_().flatten(0, 1)
        embedded = self._of_pieces.of_shares(weights).div_(weights.sum(-1, keepdim=True))
        return times(unflat(embedded.view(*scores.shape[:2], -1), self._real), self._binding[places])

    def foresee(self, x: Tensor) -> Tensor:
        """Expected sum of the terms after each position, (B, T, H), given lexical parts x (B, H); as pairs.

        Generation that subtracts some of it sees the next token with less noise (`lvm.codec.inverter.FORESEEN_SHARE`).
        """
        return self._soft_sweep(x)[0]

    @torch.inference_mode()
    def blends(self, vectors: Tensor) -> Tensor:
        """(B,) bool, True for unit vectors (B, D) float32 that one soft sweep already shows to be blends."""
        x = self._lexical(vectors)
        return self._soft_sweep(x)[1] < BLEND * square(x).sum(1)

    @torch.inference_mode()
    def _soft_sweep(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """One sweep over x (B, H) from the last position to the first: sum of the mean terms after each position,
        (B, T, H), and the sum over all positions of their energies, (B,)."""
        mean = self._starts(len(x))
        left = x - mean.sum(1)
        after, energy = torch.zeros_like(mean), torch.zeros(len(x), device=x.device)
        for t in range(self.num_places - 1, -1, -1):
            at = slice(t, t + 1)
            alone = left[:, None] + mean[:, at]
            new = self._mean(self._scores(alone, at, 0), at)
            left = (alone - new)[:, 0]
            energy += square(new[:, 0]).sum(1)
            if t:
                after[:, t - 1] = after[:, t] + new[:, 0]
        return after, energy

    def _swap(self, x: Tensor, ids: Tensor, most: int = 8) -> Tensor:
        """ids (B, T) after the best swaps of two tokens, while that explains more of x and at most `most` per row.

        Swapping i and j adds d_ij = o (R_i - R_j)(e_j - e_i) to the text's vector, which lowers the unexplained energy
        by 2 <left, d_ij> - |d_ij|^2.
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
            # |d|^2 = 2 o^2 (|e_j - e_i|^2 - <R_i (e_j - e_i), R_j (e_j - e_i)>). The inner product is computed by
            # coordinate pairs, which R_i^T R_j rotates by (j - i) angles.
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
        """ids (B, T), `nothing` after each row's end."""
        ids = torch.full((len(rows), self.num_places), self.nothing)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(list(row[: self.num_places]), dtype=torch.int64)
        return ids.to(device)

    def _unpack(self, ids: Tensor, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        """ids (B, T) as rows up to the first end token, without empty positions; an empty row stays as before."""
        out: list[list[int]] = []
        for found, before in zip(ids.tolist(), rows, strict=True):
            stop = found.index(self._end_id) + 1 if self._end_id in found else len(found)
            out.append([i for i in found[:stop] if i != self.nothing] or list(before))
        return out


class UnbindingInverter(Inverter):
    """The decode engine with `mini`'s corrector step instead of vec2text's."""

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
        """Raises InputError: this corrector step has only one result."""
        raise InputError(
            f"mini's corrector does not support beams, got width {width}; decode without one, or use a GTR codec"
        )

    def correct(
        self,
        vectors: npt.NDArray[np.float32],
        own: npt.NDArray[np.float32],
        hypotheses: Sequence[Sequence[int]],
    ) -> list[Correction]:
        """As `Inverter.correct`, without need of `own`. A blend keeps its hypothesis."""
        ids, no_text = self._unbinder.judge(self._tensor(vectors), hypotheses)
        return [Correction(row, no_text=i in no_text) for i, row in enumerate(ids)]

    def blends(self, vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
        found: npt.NDArray[np.bool_] = self._unbinder.blends(self._tensor(vectors)).cpu().numpy()
        return found
