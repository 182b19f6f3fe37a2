"""What a vector says in words: the content words that a text behind it probably holds.

A vector that no text has (a prediction, a blend, a snap) is no text's sum of words, but it still says what the text
would be about. A small network, trained on vectors of every kind, gives each of some thousand words its
probability; the words that stand out most from how common they are anyway are the evidence. A writer reads
them beside the vector.

Letters: B vectors, D vector length, E evidence words a vector, N words in the list.
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
    """The `count` content words that most texts hold, each in its commonest spelling, commonest first."""
    texts_with: Counter[str] = Counter()
    spellings: dict[str, Counter[str]] = {}
    for text in texts:
        wanted = keywords(text)
        texts_with.update(wanted)
        for spelling in WORD.findall(text):
            if (folded := spelling.casefold()) in wanted:
                spellings.setdefault(folded, Counter())[spelling] += 1
    # Case folding splits a rare letter in two, and then no word of the text spells it.
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
        """Take mean and spread of vectors (M, D), and the words' shares of all words (N,), from the training data."""
        self.centre.copy_(vectors.mean(0))
        self.spread.copy_((vectors - self.centre).norm(dim=1).mean())
        self.usual.copy_(usual.clamp_min(1e-9).log())
        self.outward.bias.copy_(self.usual)

    def centred(self, vectors: Tensor) -> Tensor:
        """(B, D + 1) float32: the direction away from the corpus mean, at the scale of a network's input, and
        how far."""
        away = vectors.float() - self.centre
        length = away.norm(dim=1, keepdim=True)
        return torch.cat((F.normalize(away, dim=1) * away.shape[1] ** 0.5, length / self.spread - 1), dim=1)

    def forward(self, vectors: Tensor) -> Tensor:
        """(B, D) unit vectors to (B, N) float32 log-probabilities of a random content word of the text."""
        out: Tensor = self.outward(F.gelu(self.inward(self.centred(vectors)))).float()
        return out.log_softmax(-1)

    @torch.no_grad()
    def words(self, vectors: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The `count` words with most evidence: ids (B, E) int64, and strengths (B, E) in nats over the usual,
        both in descending order of p log(p / usual), a word's part of the divergence from the usual."""
        logs = self(vectors)
        gain = logs - self.usual
        top = (logs.exp() * gain).topk(min(count, logs.shape[1]))
        return top.indices, gain.gather(1, top.indices)


class WordCounts:
    """Which of the words each text holds, as flat ids."""

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
