"""Predicts the content words of the text that a vector stands for.

A vector that encodes no actual text (a prediction, a blend, a snap) still shows what its text would be about. A small
network, trained on vectors of every kind, predicts the probability of each of several thousand words. The words most
above their base rate are the evidence, which the writer gets along with the vector.

Letters: B vectors, D vector length, E evidence words per vector, N words in the list.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lvm.codec.ladder import keywords

WORD = re.compile(r"\w+")


def choose_words(texts: Iterable[str], count: int) -> list[str]:
    """The `count` content words that occur in the most texts, commonest first, each in its commonest spelling."""
    texts_with: Counter[str] = Counter()
    spellings: dict[str, Counter[str]] = {}
    for text in texts:
        wanted = keywords(text)
        texts_with.update(wanted)
        for spelling in WORD.findall(text):
            if (folded := spelling.casefold()) in wanted:
                spellings.setdefault(folded, Counter())[spelling] += 1
    # Case folding turns a few letters into two; such a word may match no spelling and is listed folded.
    chosen = [word for word, _ in texts_with.most_common(count)]
    return [spellings.get(word, Counter([word])).most_common(1)[0][0] for word in chosen]


class Evidence(nn.Module):
    """Vectors to log-probabilities of words."""

    centre: Tensor
    spread: Tensor
    usual: Tensor

    def __init__(self, dim: int, num_words: int, width: int = 384) -> None:
        super().__init__()
        self.inward = nn.Linear(dim + 1, width)
        self.outward = nn.Linear(width, num_words)
        # Set by `describe`, before any training.
        self.register_buffer("centre", torch.zeros(dim))
        self.register_buffer("spread", torch.ones(()))
        self.register_buffer("usual", torch.zeros(num_words))

    @torch.no_grad()
    def describe(self, vectors: Tensor, usual: Tensor) -> None:
        """Set the input scaling from training vectors (M, D), and the base rates to `usual` (N,), which sum to 1."""
        self.centre.copy_(vectors.mean(0))
        self.spread.copy_((vectors - self.centre).norm(dim=1).mean())
        self.usual.copy_(usual.clamp_min(1e-9).log())
        self.outward.bias.copy_(self.usual)

    def centred(self, vectors: Tensor) -> Tensor:
        """(B, D + 1) float32: direction from the corpus mean, at unit variance, and relative distance from it."""
        away = vectors.float() - self.centre
        length = away.norm(dim=1, keepdim=True)
        return torch.cat((F.normalize(away, dim=1) * away.shape[1] ** 0.5, length / self.spread - 1), dim=1)

    def forward(self, vectors: Tensor) -> Tensor:
        """(B, D) unit vectors to (B, N) float32 log-probabilities that a random content word of the text is each."""
        out: Tensor = self.outward(F.gelu(self.inward(self.centred(vectors)))).float()
        return out.log_softmax(-1)

    @torch.no_grad()
    def words(self, vectors: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The `count` words with the most evidence: ids (B, E) int64, and strengths (B, E), log(p / base rate) in nats.

        In descending order of p log(p / base rate), the word's share of the KL divergence from the base rates.
        """
        logs = self(vectors)
        gain = logs - self.usual
        top = (logs.exp() * gain).topk(min(count, logs.shape[1]))
        return top.indices, gain.gather(1, top.indices)


class WordCounts:
    """The listed words that each text contains, as flat ids."""

    def __init__(self, texts: Sequence[str], words: Sequence[str]) -> None:
        ids = {word.casefold(): i for i, word in enumerate(words)}
        rows = [sorted({ids[w] for w in keywords(text) if w in ids}) for text in texts]
        self.ends = torch.tensor([0] + [len(r) for r in rows]).cumsum(0)
        self.ids = torch.tensor([i for row in rows for i in row], dtype=torch.int64)
        self.num_words = len(words)

    def targets(self, rows: Tensor) -> Tensor:
        """(B, N) float32 target distributions, uniform over each text's words; zeros for a text without any."""
        out = torch.zeros(len(rows), self.num_words)
        for i, row in enumerate(rows.tolist()):
            ids = self.ids[self.ends[row] : self.ends[row + 1]]
            if len(ids):
                out[i, ids] = 1 / len(ids)
        return out

    def usual(self) -> Tensor:
        """(N,) base rates: each word's share of the listed words in all texts."""
        return torch.bincount(self.ids, minlength=self.num_words).float() / max(1, len(self.ids))
