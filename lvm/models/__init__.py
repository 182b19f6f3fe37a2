"""Predictors: context vectors (B, T, D) in, the next vector (B, D) out, all of norm 1.

`MODELS[name](CONFIGS[name]())` makes one of the default sizes, `MODELS[name](TOYS[name])` a tiny one.
"""

from collections.abc import Callable
from typing import Any

from lvm.errors import InputError
from lvm.models import amn, gru, lstm, transformer
from lvm.models.amn import AMN, AMNConfig
from lvm.models.gru import GRU, GRUConfig
from lvm.models.lstm import LSTM, LSTMConfig
from lvm.models.transformer import Transformer, TransformerConfig

Predictor = AMN | LSTM | GRU | Transformer
Config = AMNConfig | LSTMConfig | GRUConfig | TransformerConfig

MODELS: dict[str, Callable[[Any], Predictor]] = {
    "amn": AMN,
    "lstm": LSTM,
    "gru": GRU,
    "transformer": Transformer,
}
CONFIGS: dict[str, type[Config]] = {
    "amn": AMNConfig,
    "lstm": LSTMConfig,
    "gru": GRUConfig,
    "transformer": TransformerConfig,
}
TOYS: dict[str, Config] = {"amn": amn.TOY, "lstm": lstm.TOY, "gru": gru.TOY, "transformer": transformer.TOY}


def build(name: str, sizes: dict[str, Any] | None = None) -> Predictor:
    """A new, untrained predictor; `sizes` are fields of its config that differ from the default.

    Raises InputError for an unknown name, listing the known ones, and for an unknown size.
    """
    require_known(name)
    try:
        config = CONFIGS[name](**(sizes or {}))
    except TypeError as err:
        raise InputError(f"sizes of model {name!r} do not fit this version: {err}") from err
    return MODELS[name](config)


def require_known(name: str) -> None:
    """Return when `name` is a predictor's, else raise InputError with the names there are."""
    if name not in MODELS:
        raise InputError(f"unknown model {name!r}; expected one of {', '.join(MODELS)}")
