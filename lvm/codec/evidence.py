"""Predicts the content words of the text behind a vector.

A vector that encodes no actual text (a prediction, a blend, a snap) is not a sum of one text's words, but it still
shows what the text would be about. A small network, trained on vectors of every kind, gives a probability to each of
several thousand words; the words most above their base rate are the evidence. The writer reads them along with the
vector.

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
    """The `count` content words found in the most texts, each in its commonest spelling, commonest first."""
    texts_with: Counter[str] = Counter()
    spellings: dict[str, Counter[str]] = {}
    for text in texts:
        wanted = keywords(text)
        texts_with.update(wanted)
        for spelling in WORD.findall(text):
            if (folded := spelling.casefold()) in wanted:
                spellings.setdefault(folded, Counter())[spelling] += 1
    # Case folding turns a few letters into two; no spelling in the text then matches.
    return [
        spellings.get(word, Counter([word])).most_common(1)[0][0] for word, _ in texts_with.most_common(count)
    ]


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
        """Set the mean and spread from training vectors (M, D), and the base rates from the words' shares (N,)."""
        self.centre.copy_(vectors.mean(0))
        self.spread.copy_((vectors - self.centre).norm(dim=1).mean())
        self.usual.copy_(usual.clamp_min(1e-9).log())
        self.outward.bias.copy_(self.usual)

    def centred(self, vectors: Tensor) -> Tensor:
        """(B, D + 1) float32: the direction from the corpus mean, scaled for a network's input, and the distance."""
        away = vectors.float() - self.centre
        length = away.norm(dim=1, keepdim=True)
        return torch.cat((F.normalize(away, dim=1) * away.shape[1] ** 0.5, length / self.spread - 1), dim=1)

    def forward(self, vectors: Tensor) -> Tensor:
        """(B, D) unit vectors to (B, N) float32 log-probabilities of a random content word of the text."""
        out: Tensor = self.outward(F.gelu(self.inward(self.centred(vectors)))).float()
        return out.log_softmax(-1)

    @torch.no_grad()
    def words(self, vectors: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The `count` words with most evidence: ids (B, E) int64, and strengths (B, E) in nats above the base rate,
        in descending order of p log(p / base rate), a word's contribution to the KL divergence from the base rates."""
        logs = self(vectors)
        gain = logs - self.usual
        top = (logs.exp() * gain).topk(min(count, logs.shape[1]))
        return top.indices, gain.gather(1, top.indices)


class WordCounts:
    """Which of the words each text contains, as flat ids."""

    def __init__(self, texts: Sequence[str], words: Sequence[str]) -> None:
        place = {word.casefold(): i for i, word in enumerate(words)}
        rows = [sorted({place[w] for w in keywords(text) if w in place}) for text in texts]
        self.ends = torch.tensor([0] + [len(r) for r in rows]).cumsum(0)
        self.ids = torch.tensor([i for row in rows for i in row], dtype=torch.int64)
        self.num_words = len(words)

    def targets(self, rows: Tensor) -> Tensor:
        """(B, N) float32: an equal share for each word of the text, rows of zeros for texts without any."""
        out = torch.zeros(len(rows), self.num_words)
        for i, row in enumerate(rows.tolist()):
            ids = self.ids[self.ends[row] : self.ends[row + 1]]
            if len(ids):
                out[i, ids] = 1 / len(ids)
        return out

    def usual(self) -> Tensor:
        """(N,) each word's share of all words of all texts."""
        return torch.bincount(self.ids, minlength=self.num_words).float() / max(1, len(self.ids))
