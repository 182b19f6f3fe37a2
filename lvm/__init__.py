"""Latent vector models: documents to vectors, a model that predicts the next one, and back to text.

Only what is light to import stands here; the rest is imported from its module (`lvm.codec.zoo`,
`lvm.vectors.sequences`, `lvm.predict.generate` and so on), so that `latent --help` loads no torch.
"""

from lvm.codec.identity import CodecIdentity, require_same_codec
from lvm.errors import IdentityError, InputError, LvmError, OutputError

__all__ = [
    "CodecIdentity",
    "IdentityError",
    "InputError",
    "LvmError",
    "OutputError",
    "require_same_codec",
]
