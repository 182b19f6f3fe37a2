"""The networks of the codec `mini`: an encoder whose vector holds topic, words and word order, and its hypothesizer.

A vector has unit norm and two parts.

- The topic part, 256 numbers: a bag of topic embeddings (initialised by latent semantic analysis) plus the output of a
  small T5 encoder, scaled to a fixed norm, and trained so that neighbouring chunks of an article are close.
- The lexical part (words and order), 512 numbers: the sum over the tokens i of their embedding e_i and of R_i e_i, the
  embedding rotated by its position. R_i rotates each coordinate pair by i times a fixed random angle. Rotating the sum
  back by t makes the token at position t stand out, while the others stay noise. This is the binding of holographic
  reduced representations (Plate 1995, IEEE TNN 6:623) in its frequency-domain form, with phases as in rotary embeddings
  (arXiv:2104.09864).

The topic part has a fixed norm before the whole is normalised, so its share of the unit vector gives the scale of the
lexical part, from which known tokens can then be subtracted.

The hypothesizer is a T5 decoder. Its memory is the vector; at step t it also sees the residual that the tokens written
so far do not explain, x - sum_{j<t} (e_j + R_j e_j). The residual, rotated back by t, is an input to the decoder and a
prior added to its output: logits = (h + gates * priors) E^T + bias, so the prior needs no matrix product of its own.
Sparse superposition codes are decoded in the same way, by explaining away (Barron & Joseph 2012, arXiv:1006.3780).

Letters: B batch, T positions, D = 768, L = 512 (lexical), H = L/2, P = 256 (topic), S memory positions, V vocabulary.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lvm.codec.t5 import T5Config, T5Stack
from lvm.errors import InputError


@dataclass(frozen=True)
class MiniConfig:
    """Sizes of encoder and hypothesizer, which determine the shapes of the weights."""

    vocabulary_size: int = 8192
    """Token ids, V."""
    max_tokens: int = 32
    """Maximum tokens of a text, end of sequence included."""
    topic_dim: int = 256
    """Dimensions of the topic part, P."""
    lexical_dim: int = 512
    """Dimensions of the lexical part, L; also the networks' width."""
    topic_share: float = 0.6
    """Share of the topic part in the energy (squared norm) of the vector of a text of `full_tokens` tokens."""
    full_tokens: int = 26
    """Mean tokens of a chunk of Wikipedia under the 32-token limit (measured: 24 to 26)."""
    word_weight: float = 1.0
    """Weight of a token's unrotated embedding."""
    order_weight: float = 0.8
    """Weight of its rotated embedding."""
    encoder_layers: int = 1
    """Blocks of the contextual encoder."""
    decoder_layers: int = 2
    """Blocks of the hypothesizer."""
    d_ff: int = 1024
    """Width inside the feed-forward layers."""
    num_heads: int = 8
    """Attention heads."""
    memory_tokens: int = 4
    """Positions into which the vector is projected for cross-attention."""
    angle_seed: int = 768
    """Seed of the fixed random angles."""

    def __post_init__(self) -> None:
        if self.lexical_dim % (2 * self.num_heads):
            raise InputError(
                f"lexical_dim must be a multiple of 2*num_heads = {2 * self.num_heads}, got {self.lexical_dim}"
            )
        if not 0.0 < self.topic_share < 1.0:
            raise InputError(f"topic_share must lie between 0 and 1, got {self.topic_share}")

    @property
    def dim(self) -> int:
        """Length of a vector, D."""
        return self.topic_dim + self.lexical_dim

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return asdict(self)


def paired(x: Tensor, real: bool = False) -> Tensor:
    """(…, L) to (…, H) complex: each coordinate pair that `Rotation` rotates becomes one complex number.

    real: (…, H, 2) float instead, for devices without complex numbers. The functions below accept both forms."""
    first, second = x.chunk(2, dim=-1)
    return torch.stack((first, second), dim=-1) if real else torch.complex(first, second)


def unpaired(z: Tensor) -> Tensor:
    """Inverse of `paired`: (…, L)."""
    return torch.cat((z.real, z.imag) if z.is_complex() else z.unbind(-1), dim=-1)


def times(z: Tensor, factor: Tensor) -> Tensor:
    """Elementwise complex product."""
    if z.is_complex():
        return z * factor
    a, b = z.unbind(-1)
    c, d = factor.unbind(-1)
    return torch.stack((a * c - b * d, a * d + b * c), dim=-1)


def conjugate(z: Tensor) -> Tensor:
    """Complex conjugate: as a factor, rotates back what `z` rotates."""
    return z.conj().resolve_conj() if z.is_complex() else torch.stack((z[..., 0], -z[..., 1]), dim=-1)


def flat(z: Tensor) -> Tensor:
    """Pairs viewed as (…, L) reals in memory order, unlike `unpaired`; for inner products the order does not matter."""
    return (torch.view_as_real(z) if z.is_complex() else z).flatten(-2)


def unflat(x: Tensor, real: bool = False) -> Tensor:
    """Inverse of `flat`."""
    z = x.unflatten(-1, (-1, 2))
    return z if real else torch.view_as_complex(z)


def square(z: Tensor) -> Tensor:
    """|z|^2, real, (…, H)."""
    return (torch.view_as_real(z) if z.is_complex() else z).square().sum(-1)


class Rotation(nn.Module):
    """Rotates coordinate pairs by position times a fixed random angle; an orthogonal map for each position."""

    cos: Tensor
    sin: Tensor

    def __init__(self, dim: int, num_places: int, seed: int) -> None:
        super().__init__()
        angles = torch.rand(dim // 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        phase = torch.arange(num_places, dtype=torch.float64)[:, None] * (2 * math.pi * angles)[None]
        self.register_buffer("cos", phase.cos().float(), persistent=False)
        self.register_buffer("sin", phase.sin().float(), persistent=False)

    def turns(self, real: bool = False) -> Tensor:
        """(num_places, H) pairs: a `paired` vector times row i is rotated by i positions, times its conjugate back."""
        return paired(torch.cat((self.cos, self.sin), dim=-1), real)

    def forward(self, x: Tensor, first: int = 0, back: bool = False) -> Tensor:
        """x (B, T, L) with row t rotated by first + t positions, or rotated back."""
        T = x.shape[-2]
        cos, sin = self.cos[first : first + T], self.sin[first : first + T]
        if back:
            sin = -sin
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class MiniEncoder(nn.Module):
    """Token ids to unit vectors."""

    centre: Tensor

    def __init__(self, config: MiniConfig) -> None:
        super().__init__()
        self.config = config
        L, P = config.lexical_dim, config.topic_dim
        self.tokens = nn.Embedding(config.vocabulary_size, L)
        self.topics = nn.Embedding(config.vocabulary_size, P)
        self.rotation = Rotation(L, config.max_tokens + 2, config.angle_seed)
        self.inward = nn.Linear(L, L, bias=False)
        self.contextual = T5Stack(
            T5Config(L, L // config.num_heads, config.num_heads, config.d_ff, config.encoder_layers, False)
        )
        self.outward = nn.Linear(2 * L, P, bias=False)
        nn.init.normal_(self.tokens.weight, std=L**-0.5)  # near-orthogonal rows of norm about 1
        nn.init.normal_(self.topics.weight, std=P**-0.5)
        # Mean of the topic part, which is subtracted: otherwise unrelated texts would look similar.
        self.register_buffer("centre", torch.zeros(P))
        # Near zero: training starts from the bag of topic embeddings alone.
        nn.init.normal_(self.outward.weight, std=0.1 * (2 * L) ** -0.5)

    @property
    def topic_norm(self) -> float:
        """Norm of the topic part before the whole is normalised, in units of one token's embedding."""
        c = self.config
        lexical_energy: float = c.full_tokens * (c.word_weight**2 + c.order_weight**2)
        return math.sqrt(lexical_energy * c.topic_share / (1 - c.topic_share))

    def binding(self, real: bool = False) -> Tensor:
        """(T + 2, H) pairs: a `paired` embedding times row i is its term at position i, as in `bound`."""
        w, o = self.config.word_weight, self.config.order_weight
        return paired(torch.cat((w + o * self.rotation.cos, o * self.rotation.sin), dim=-1), real)

    def bound(self, embedded: Tensor, mask: Tensor | None) -> Tensor:
        """Each token's term of the lexical part, (B, T, L) float32: w e_i + o R_i e_i."""
        c = self.config
        e = embedded.float() if mask is None else embedded.float() * mask[..., None]
        out: Tensor = c.word_weight * e + c.order_weight * self.rotation(e)
        return out

    def topic(self, ids: Tensor, embedded: Tensor, mask: Tensor) -> Tensor:
        """The topic part before centring and scaling, (B, P) float32."""
        hidden = self.contextual(self.inward(embedded) * self.config.lexical_dim**0.5, mask)
        real = mask[..., None]
        count = mask.sum(1, keepdim=True).clamp(min=1).float()
        mean = (hidden * real).float().sum(1) / count
        peak = hidden.float().masked_fill(~real, float("-inf")).amax(1)
        bag = (self.topics(ids) * real).float().sum(1) / count.sqrt()
        out: Tensor = bag + self.outward(torch.cat((mean, peak), dim=-1)).float()
        return out

    def forward(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """ids (B, T) int64 and mask (B, T) bool, None without padding, to (B, D) float32 of unit norm.

        As in batch normalisation, the topic part is centred by the batch mean in training mode, otherwise by `centre`,
        which training sets from many chunks.
        """
        embedded = self.tokens(ids)
        lexical = self.bound(embedded, mask).sum(1)
        topic = self.topic(ids, embedded, torch.ones_like(ids, dtype=torch.bool) if mask is None else mask)
        topic = F.normalize(topic - (topic.mean(0) if self.training else self.centre), dim=-1)
        return F.normalize(torch.cat((topic * self.topic_norm, lexical), dim=-1), dim=-1)


class MiniHypothesizer(nn.Module):
    """Unit vectors to token ids: a T5 decoder with a lexical prior from the vector added to its logits.

    The encoder's token table is shared (tied input, output and binding), so it is passed in, not owned.
    """

    NUM_GATES = 4

    def __init__(self, config: MiniConfig, topic_norm: float) -> None:
        super().__init__()
        self.config = config
        self.topic_norm = topic_norm
        L = config.lexical_dim
        self.rotation = Rotation(L, config.max_tokens + 2, config.angle_seed)
        self.memory = nn.Linear(config.dim, config.memory_tokens * L, bias=False)
        self.glimpse = nn.Linear(3 * L, L, bias=False)
        self.decoder = T5Stack(
            T5Config(L, L // config.num_heads, config.num_heads, config.d_ff, config.decoder_layers, True)
        )
        self.gates = nn.Linear(L, self.NUM_GATES)
        self.bias = nn.Parameter(torch.zeros(config.vocabulary_size))
        nn.init.normal_(self.memory.weight, std=1.0)  # inputs are of unit norm: memory of about unit variance
        nn.init.normal_(self.glimpse.weight, std=(3 * L) ** -0.5)
        nn.init.normal_(self.gates.weight, std=0.01)
        # Token embeddings have norm about 1, so states of norm sqrt(L) would give logits of unit variance; smaller
        # states let the priors dominate at first.
        nn.init.constant_(self.decoder.final_layer_norm.weight, 0.3)
        # The order of magnitude of a matched filter, signal / noise^2; in the order of `priors`.
        with torch.no_grad():
            self.gates.bias.copy_(torch.tensor([2.0, 8.0, 1.0, 2.0]))

    def unscale(self, vectors: Tensor) -> Tensor:
        """The lexical part in units of one token's embedding, (B, L) float32.

        The norm of the topic part was `topic_norm` before normalisation, so its norm now gives the scale.
        """
        P = self.config.topic_dim
        topic, lexical = vectors[:, :P].float(), vectors[:, P:].float()
        scale = topic.norm(dim=-1, keepdim=True).clamp(min=0.05) / self.topic_norm
        out: Tensor = lexical / scale
        return out

    def remember(self, vectors: Tensor) -> Tensor:
        """Memory for cross-attention, (B, S, L)."""
        memory: Tensor = self.memory(vectors)
        return memory.view(-1, self.config.memory_tokens, self.config.lexical_dim)

    def priors(self, lexical: Tensor, residual: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
        """The four priors (B, T, 4, L), and the residual as the decoder sees it (the glimpse), (B, T, 3L).

        lexical: (B, T, L), the vector's lexical part; residual: (B, T, L), the same minus the terms of the tokens
        before each position. first: position of the first row. `lvm.codec.inverter.MiniWriter` does the same on complex
        pairs.
        """
        lexical_here = self.rotation(lexical, first, back=True)
        here = self.rotation(residual, first, back=True)
        following = self.rotation(residual, first + 1, back=True)
        glimpse = torch.cat((here, following, residual), dim=-1)
        return torch.stack((lexical_here, here, lexical, residual), dim=-2), glimpse

    def hidden(self, inputs: Tensor, glimpse: Tensor) -> Tensor:
        """The decoder's input (B, T, L) from the previous tokens' embeddings and the glimpse."""
        L = self.config.lexical_dim
        out: Tensor = inputs * L**0.5 + self.glimpse(glimpse)
        return out

    def head(self, state: Tensor, priors: Tensor) -> Tensor:
        """Input to the output table, (B, T, L) float32: the state plus the gated priors."""
        gates: Tensor = self.gates(state).float()
        return state.float() + (gates[..., None] * priors).sum(-2)

    def forward(self, vectors: Tensor, ids: Tensor, mask: Tensor, encoder: MiniEncoder) -> Tensor:
        """Teacher-forced states before the output table, (B, T, L) float32; logits are `state @ table.T + bias`.

        vectors (B, D); ids (B, T) the target tokens; mask (B, T) bool, True on real ones. State t depends only on the
        tokens before t.
        """
        embedded = encoder.tokens(ids)
        x = self.unscale(vectors)[:, None, :]
        explained = encoder.bound(embedded, mask).cumsum(1)
        residual = x - F.pad(explained, (0, 0, 1, 0))[:, :-1]
        priors, glimpse = self.priors(x.expand_as(residual), residual)
        shifted = F.pad(embedded, (0, 0, 1, 0))[:, :-1]  # no token before the first: zeros
        state = self.decoder(self.hidden(shifted, glimpse), None, self.remember(vectors))
        return self.head(state, priors)
