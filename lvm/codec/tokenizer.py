"""The codec's tokenizer as the chunker and the encoder see it, and how `mini`'s own is made.

No torch here: cutting half a million chunks must not load a model.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from lvm.errors import InputError

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
"""T5's special tokens, in T5's order: ids 0, 1, 2."""

SPECIAL = ((END, PAD), ("[SEP]", "[PAD]"))
"""End and padding tokens of the tokenizers read here: T5's and most others', BERT's."""


_NOT_NESTED = "give one list of texts, or encode each list by itself"
_BYTES = 'decode it first: value.decode("utf-8")'
_CURE = {
    bytes: _BYTES,
    bytearray: _BYTES,
    list: _NOT_NESTED,
    tuple: _NOT_NESTED,
    type(None): "leave out what has no text",
}
"""What to do with a value that is no text, by its type."""

_SURROGATE = re.compile("[\ud800-\udfff]")


def require_texts(texts: object) -> list[str]:
    """A str as a list of one, a sequence of str as a list. Raises InputError on all else, with its place."""
    if isinstance(texts, str):
        texts = [texts]
    if not isinstance(texts, Sequence) or isinstance(texts, bytes | bytearray):
        cure = _CURE.get(type(texts), "make a list of str of it")
        raise InputError(f"expected a str or a list of str, got {type(texts).__name__}; {cure}")
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            cure = _CURE.get(type(text), "give texts alone")
            raise InputError(f"text {place} of {len(texts)} is {type(text).__name__}, expected str; {cure}")
        if not text.isascii() and _SURROGATE.search(text):
            raise InputError(
                f"text {place} of {len(texts)} holds half a surrogate pair, which is no character; decode its bytes "
                'again, with errors="replace"'
            )
    return list(texts)


class ChunkTokenizer:
    """Text to token ids under one codec's limit; the end-of-sequence token always counts."""

    def __init__(self, tokenizer: Tokenizer, max_tokens: int, sha256: str) -> None:
        self.max_tokens = max_tokens
        """Tokens a text may have, end of sequence included."""
        self.sha256 = sha256
        """Hash of tokenizer.json, 64 hex digits; part of the codec's identity."""
        self._tokenizer = tokenizer
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        found = [(tokenizer.token_to_id(end), tokenizer.token_to_id(pad)) for end, pad in SPECIAL]
        whole = [pair for pair in found if None not in pair]
        if not whole:
            names = " or ".join(f"{end} and {pad}" for end, pad in SPECIAL)
            raise InputError(f"the tokenizer lacks its special tokens; expected {names}")
        self.end_id: int
        self.pad_id: int
        self.end_id, self.pad_id = whole[0]  # type: ignore[assignment]
        controls = [t.content for t in tokenizer.get_added_tokens_decoder().values() if len(t.content) > 1]
        spelt = [re.escape(c) for c in controls]
        if (
            tokenizer.token_to_id("<0x41>") is not None
        ):  # a byte where no piece fits, which decodes to that byte
            controls.append("<0x41>")
            spelt.append("<0x[0-9A-F]{2}>")
        self._control = re.compile("|".join(spelt))
        self._control_starts = {c[0] for c in controls}
        self._inside = Tokenizer.from_str(_without_prefix(tokenizer.to_str()))
        """For what follows a cut inside a control token: no new word."""
        self.num_special = len(tokenizer.encode("").ids)
        """Tokens that every text has besides its own: 1 with T5's end, 2 with BERT's beginning and end."""

    @classmethod
    def load(cls, path: Path, max_tokens: int) -> "ChunkTokenizer":
        """The tokenizer of a tokenizer.json. Raises InputError when the file is absent or no tokenizer."""
        try:
            raw = path.read_bytes()
            tokenizer = Tokenizer.from_buffer(raw)
        except FileNotFoundError as err:
            raise InputError(f"no tokenizer at {path}; expected the codec's tokenizer.json there") from err
        except Exception as err:  # the library raises bare Exception on bad JSON
            raise InputError(f"{path} is not a tokenizer.json: {err}; copy the codec's folder again") from err
        return cls(tokenizer, max_tokens, hashlib.sha256(raw).hexdigest())

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids."""
        return self._tokenizer.get_vocab_size()

    def log_frequencies(self) -> list[float]:
        """Log probability of each id in running text, in nats: a unigram tokenizer's own scores.

        The end token comes once a text, here once in 22 tokens; padding and unknown pieces as good as never. Equal for
        all ids where the tokenizer is of another kind.
        """
        model = json.loads(self._tokenizer.to_str())["model"]
        size = self.vocabulary_size
        if model["type"] != "Unigram":
            return [-math.log(size)] * size
        never = -30.0
        scores = [float(score) for _, score in model["vocab"]] + [never] * (size - len(model["vocab"]))
        for special in (PAD, UNKNOWN):
            place = self._tokenizer.token_to_id(special)
            if place is not None:
                scores[place] = never
        scores[self.end_id] = -math.log(22)
        return scores

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, end of sequence included, before any cut."""
        return [len(ids) for ids in self._ids(texts)]

    def encode(self, texts: Sequence[str]) -> tuple[list[list[int]], list[int]]:
        """Token ids of each text, cut to `max_tokens` with the end token kept, and lengths before the cut."""
        rows: list[list[int]] = []
        lengths: list[int] = []
        for ids in self._ids(texts):
            lengths.append(len(ids))
            rows.append([*ids[: self.max_tokens - 1], self.end_id] if len(ids) > self.max_tokens else ids)
        return rows, lengths

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Character span of each content token (no end token), in order."""
        if not self._has_control(text):
            return list(self._tokenizer.encode(text, add_special_tokens=False).offsets)
        return [span for _, span in self._spelt(text)]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, end of sequence included. Control tokens in a text are plain characters."""
        rows = [e.ids for e in self._tokenizer.encode_batch_fast(list(texts))]
        for i, text in enumerate(texts):
            if self._has_control(text):
                frame = self._tokenizer.encode("").ids
                rows[i] = [*frame[:-1], *(token for token, _ in self._spelt(text)), frame[-1]]
        return rows

    def _has_control(self, text: str) -> bool:
        return any(c in text for c in self._control_starts) and self._control.search(text) is not None

    def _spelt(self, text: str) -> list[tuple[int, tuple[int, int]]]:
        """Tokens and spans of a text in which control tokens are written out: each is cut after its first character,
        so that neither the tokenizer nor its model finds it."""
        cuts = [m.start() + 1 for m in self._control.finditer(text)]
        out: list[tuple[int, tuple[int, int]]] = []
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            tokenizer = self._inside if start else self._tokenizer
            encoding = tokenizer.encode(text[start:end], add_special_tokens=False)
            spans = ((start + a, start + b) for a, b in encoding.offsets)
            out += zip(encoding.ids, spans, strict=True)
        return out

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Texts of token ids; special tokens are left out."""
        return list(self._tokenizer.decode_batch([list(r) for r in rows], skip_special_tokens=True))


def _without_prefix(tokenizer_json: str) -> str:
    """The tokenizer with no space put before a text."""

    def never(part: Any) -> None:
        if isinstance(part, dict):
            if part.get("type") == "Metaspace":
                part["prepend_scheme"] = "never"
            for inner in part.get("pretokenizers", []):
                never(inner)

    state = json.loads(tokenizer_json)
    never(state.get("pre_tokenizer"))
    return json.dumps(state)


def train_tokenizer(texts: Iterable[str], vocabulary_size: int, path: Path) -> None:
    """Fit a unigram tokenizer with byte fallback and write it to `path` as tokenizer.json.

    Unigram (Kudo 2018, arXiv:1804.10959) as T5 has it; byte fallback so that no text is unreadable.
    Not NFKC, as T5 has it: only NFC and runs of white space to one space, so that decoded text equals its source.
    """
    tokenizer = Tokenizer(models.Unigram(byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    byte_tokens = [f"<0x{b:02X}>" for b in range(256)]
    trainer = trainers.UnigramTrainer(
        vocab_size=vocabulary_size - len(byte_tokens),
        special_tokens=[PAD, END, UNKNOWN],
        unk_token=UNKNOWN,
        max_piece_length=16,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # The trainer knows no byte pieces, so they are appended with the lowest score of all: a byte is
    # taken only where no piece fits.
    state = json.loads(tokenizer.to_str())
    vocab = state["model"]["vocab"]
    floor = min(score for _, score in vocab) - 10.0
    known = {piece for piece, _ in vocab}
    vocab.extend([t, floor] for t in byte_tokens if t not in known)
    state["model"]["unk_id"] = next(i for i, (piece, _) in enumerate(vocab) if piece == UNKNOWN)
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path), pretty=False)
