"""Cut a text into chunks for a codec."""

from typing import TYPE_CHECKING

from lvm.codec.tokenizer import require_texts
from lvm.codec.zoo import load_tokenizer
from lvm.corpus.chunker import chunk_article
from lvm.corpus.records import Article
from lvm.errors import InputError

if TYPE_CHECKING:
    from lvm.codec.zoo import Codec


def chunk(text: str, codec: "Codec | str" = "mini") -> list[str]:
    """Chunks of a text in order, each within the codec's token limit: cut at sentences if they fit, else at clauses.

    Runs of white space become one space; nothing else is lost. A text without words has no chunks. codec: a loaded
    codec, or the name of one whose tokenizer is available. Raises InputError if the text is not a str.
    """
    if not isinstance(text, str):
        raise InputError(f"expected one text, got {type(text).__name__}; call chunk for each text")
    require_texts(text)
    if not isinstance(codec, str) and not hasattr(codec, "tokenizer"):
        raise InputError(
            f"codec is {codec!r:.100}; expected a name such as 'mini', or what lvm.load_codec returns"
        )
    tokenizer = load_tokenizer(codec) if isinstance(codec, str) else codec.tokenizer
    return [c.text for c in chunk_article(Article("", "", text, ""), tokenizer)]
