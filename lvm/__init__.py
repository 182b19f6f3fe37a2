"""Latent vector models: documents to vectors, a model that predicts the next vector, and the vector back to text.

    import lvm

    codec = lvm.load_codec("mini")
    vectors = codec.encode(lvm.chunk(text))                 # (N, 768) float32, norm 1
    texts = codec.decode(vectors, steps=1).texts
    generator = lvm.Generator(codec, lvm.load_predictor("gru"))
    (predictions,) = generator.generate([text], length=3)   # each with text, source and cosine
    predictor = lvm.fit(lvm.open_vectors("out/vectors"), "out/models", model="amn")

Names are loaded from their modules when they are first used (PEP 562): `import lvm` takes no torch and no numpy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lvm.codec.identity import CodecIdentity, require_same_codec
    from lvm.codec.zoo import Codec, load_codec
    from lvm.errors import IdentityError, InputError, LvmError, OutputError, StorageError, TrainingError
    from lvm.predict.fitting import fit
    from lvm.predict.generate import Generator, Prediction
    from lvm.predict.predictor import TrainedPredictor, load_predictor
    from lvm.text import chunk
    from lvm.vectors.array import open_vectors
    from lvm.vectors.index import load_index
    from lvm.vectors.sequences import Windows, WindowSettings, make_windows

__all__ = [
    "Codec",
    "CodecIdentity",
    "Generator",
    "IdentityError",
    "InputError",
    "LvmError",
    "OutputError",
    "Prediction",
    "StorageError",
    "TrainedPredictor",
    "TrainingError",
    "WindowSettings",
    "Windows",
    "chunk",
    "fit",
    "load_codec",
    "load_index",
    "load_predictor",
    "make_windows",
    "open_vectors",
    "require_same_codec",
]

_MODULES = {
    "lvm.codec.identity": ("CodecIdentity", "require_same_codec"),
    "lvm.codec.zoo": ("Codec", "load_codec"),
    "lvm.errors": ("IdentityError", "InputError", "LvmError", "OutputError", "StorageError", "TrainingError"),
    "lvm.predict.fitting": ("fit",),
    "lvm.predict.generate": ("Generator", "Prediction"),
    "lvm.predict.predictor": ("TrainedPredictor", "load_predictor"),
    "lvm.text": ("chunk",),
    "lvm.vectors.index": ("load_index",),
    "lvm.vectors.array": ("open_vectors",),
    "lvm.vectors.sequences": ("WindowSettings", "Windows", "make_windows"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'lvm' has no attribute {name!r}; it offers {', '.join(__all__)}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value  # once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
