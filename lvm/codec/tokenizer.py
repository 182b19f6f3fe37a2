"""The codec's tokenizer, for the chunker and the encoder, and the training of `mini`'s. Imports no torch, as the
chunker must not load a model.
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
"""T5's special tokens; their ids are 0, 1, 2."""

SPECIAL = ((END, PAD), ("[SEP]", "[PAD]"))
"""End and padding tokens of supported tokenizers: T5's and most others', BERT's."""

_FIX: dict[type, str] = {
    **dict.fromkeys((bytes, bytearray), 'decode it first: value.decode("utf-8")'),
    **dict.fromkeys((list, tuple), "give one list of texts, or encode each list by itself"),
    type(None): "leave out missing texts",
}
"""Advice for a value that is not a text, by its type."""

_SURROGATE = re.compile("[\ud800-\udfff]")


def require_texts(texts: object) -> list[str]:
    """A str as a list of one, a sequence of str as a list. Raises InputError on anything else, naming the index."""
    if isinstance(texts, str):
        texts = [texts]
    if not isinstance(texts, Sequence) or isinstance(texts, bytes | bytearray):
        fix = _FIX.get(type(texts), "convert it to a list of str")
        raise InputError(f"expected a str or a list of str, got {type(texts).__name__}; {fix}")
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            fix = _FIX.get(type(text), "give only texts")
            raise InputError(f"text {place} of {len(texts)} is {type(text).__name__}, expected str; {fix}")
        if not text.isascii() and _SURROGATE.search(text):
            raise InputError(
                f"text {place} of {len(texts)} holds half a surrogate pair, which is not a character; decode its bytes "
                'again, with errors="replace"'
            )
    return list(texts)


class ChunkTokenizer:
    """Text to token ids within a codec's token limit. The end-of-sequence token always counts."""

    def __init__(self, tokenizer: Tokenizer, max_tokens: int, sha256: str) -> None:
        self.max_tokens = max_tokens
        """Maximum tokens of a text, end of sequence included."""
        self.sha256 = sha256
        """Hash of tokenizer.json, 64 hex digits; part of the codec's identity."""
        self._tokenizer = tokenizer
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        ids = [(tokenizer.token_to_id(end), tokenizer.token_to_id(pad)) for end, pad in SPECIAL]
        known = [pair for pair in ids if None not in pair]
        if not known:
            names = " or ".join(f"{end} and {pad}" for end, pad in SPECIAL)
            raise InputError(f"the tokenizer lacks its special tokens; expected {names}")
        self.end_id: int
        self.pad_id: int
        self.end_id, self.pad_id = known[0]  # type: ignore[assignment]
        controls = [t.content for t in tokenizer.get_added_tokens_decoder().values() if len(t.content) > 1]
        patterns = [re.escape(c) for c in controls]
        if (
            tokenizer.token_to_id("<0x41>") is not None
        ):  # byte fallback: a literal "<0x41>" would decode to "A"
            controls.append("<0x41>")
            patterns.append("<0x[0-9A-F]{2}>")
        self._control = re.compile("|".join(patterns))
        self._control_starts = {c[0] for c in controls}
        self._continuing = Tokenizer.from_str(_without_prefix(tokenizer.to_str()))
        """For text that does not start a word."""
        self.num_special = len(tokenizer.encode("").ids)
        """Special tokens added to every text: 1 for T5 (end), 2 for BERT (start and end)."""

    @classmethod
    def load(cls, path: Path, max_tokens: int) -> "ChunkTokenizer":
        """The tokenizer in a tokenizer.json. Raises InputError when the file is missing or invalid."""
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
        """Log-probability of each id in running text, nats: the scores of a unigram tokenizer, uniform for other kinds.

        The end token counts as one in 22, padding and unknown tokens as almost none.
        """
        model = json.loads(self._tokenizer.to_str())["model"]
        size = self.vocabulary_size
        if model["type"] != "Unigram":
            return [-math.log(size)] * size
        never = -30.0
        scores = [float(score) for _, score in model["vocab"]] + [never] * (size - len(model["vocab"]))
        for special in (PAD, UNKNOWN):
            if (token := self._tokenizer.token_to_id(special)) is not None:
                scores[token] = never
        scores[self.end_id] = -math.log(22)
        return scores

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text before truncation, end of sequence included."""
        return [len(ids) for ids in self._ids(texts)]

    def encode(self, texts: Sequence[str]) -> tuple[list[list[int]], list[int]]:
        """Token ids of each text, truncated to `max_tokens` with the end token kept, and lengths before truncation."""
        rows: list[list[int]] = []
        lengths: list[int] = []
        for ids in self._ids(texts):
            lengths.append(len(ids))
            rows.append([*ids[: self.max_tokens - 1], self.end_id] if len(ids) > self.max_tokens else ids)
        return rows, lengths

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Character span of each token without the special ones, in order."""
        if not self._has_control(text):
            return list(self._tokenizer.encode(text, add_special_tokens=False).offsets)
        return [span for _, span in self._literal(text)]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, special tokens included. Control tokens in a text count as plain characters."""
        rows = [e.ids for e in self._tokenizer.encode_batch_fast(list(texts))]
        for i, text in enumerate(texts):
            if self._has_control(text):
                special = self._tokenizer.encode("").ids
                rows[i] = [*special[:-1], *(token for token, _ in self._literal(text)), special[-1]]
        return rows

    def _has_control(self, text: str) -> bool:
        return any(c in text for c in self._control_starts) and self._control.search(text) is not None

    def _literal(self, text: str) -> list[tuple[int, tuple[int, int]]]:
        """Tokens and spans of a text that contains control tokens as characters: the text is cut after the first
        character of each, so that the tokenizer does not recognise it."""
        cuts = [m.start() + 1 for m in self._control.finditer(text)]
        out: list[tuple[int, tuple[int, int]]] = []
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            tokenizer = self._continuing if start else self._tokenizer
            encoding = tokenizer.encode(text[start:end], add_special_tokens=False)
            spans = ((start + a, start + b) for a, b in encoding.offsets)
            out += zip(encoding.ids, spans, strict=True)
        return out

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Texts of token ids, without special tokens."""
        return list(self._tokenizer.decode_batch([list(r) for r in rows], skip_special_tokens=True))


def _without_prefix(tokenizer_json: str) -> str:
    """The tokenizer's JSON, changed so that no space is put before texts."""

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

    Unigram (Kudo 2018, arXiv:1804.10959), as in T5; byte fallback, so that every text can be encoded. Normalises to
    NFC, not T5's NFKC, and white space to single spaces; otherwise the decoded text equals its source.
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
    # The trainer adds no byte tokens. They get the lowest score, to be used only where nothing else fits.
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
