"""Predictors: context vectors (B, T, D) in, the next vector (B, D) out, all of norm 1.

`MODELS[name](CONFIGS[name]())` makes one of the default sizes, `MODELS[name](TOYS[name])` a tiny one. An
`ensemble` is made of trained ones and is none of MODELS: `build` makes it, nothing trains it.

An architecture may have, for the training loop: `loss(contexts, targets)`, a scalar that is minimised in the place of
squared distance; `prepare(targets)`, called once with batches of training targets before the first step; and
`solves_output = False` where no regression can set its output layer.
"""

from collections.abc import Callable
from typing import Any

from lvm.errors import InputError
from lvm.models import (
    amn,
    gpt2,
    gru,
    hybrid,
    hyena,
    lcm_diffusion,
    lcm_quant,
    linformer,
    lstm,
    mamba2,
    performer,
    retnet,
    rwkv,
    s4,
    transformer,
)
from lvm.models.amn import AMN, AMNConfig
from lvm.models.codes import read_codes
from lvm.models.ensemble import Ensemble as Ensemble
from lvm.models.ensemble import EnsembleConfig as EnsembleConfig
from lvm.models.gru import GRU, GRUConfig
from lvm.models.lstm import LSTM, LSTMConfig
from lvm.models.transformer import Transformer, TransformerConfig
from lvm.models.trunk import Trunk

Architecture = AMN | LSTM | GRU | Transformer | Trunk
Predictor = Architecture | Ensemble

OPTIMIZED = "transformer-optimized"
"""The Transformer under a recipe of its own (`lvm.predict.training.OWN_RECIPES`); otherwise the same architecture."""

_TABLE: dict[str, tuple[Callable[[Any], Architecture], type[Any], Any, dict[str, tuple[Any, ...]]]] = {
    "amn": (AMN, AMNConfig, amn.TOY, amn.SPACE),
    "lstm": (LSTM, LSTMConfig, lstm.TOY, lstm.SPACE),
    "gru": (GRU, GRUConfig, gru.TOY, gru.SPACE),
    "transformer": (Transformer, TransformerConfig, transformer.TOY, transformer.SPACE),
    OPTIMIZED: (Transformer, TransformerConfig, transformer.TOY, transformer.SPACE),
    "mamba2": (mamba2.Mamba2, mamba2.Mamba2Config, mamba2.TOY, mamba2.SPACE),
    "s4": (s4.S4, s4.S4Config, s4.TOY, s4.SPACE),
    "rwkv": (rwkv.RWKV, rwkv.RWKVConfig, rwkv.TOY, rwkv.SPACE),
    "hybrid": (hybrid.Hybrid, hybrid.HybridConfig, hybrid.TOY, hybrid.SPACE),
    "gpt2": (gpt2.GPT2, gpt2.GPT2Config, gpt2.TOY, gpt2.SPACE),
    "linformer": (linformer.Linformer, linformer.LinformerConfig, linformer.TOY, linformer.SPACE),
    "performer": (performer.Performer, performer.PerformerConfig, performer.TOY, performer.SPACE),
    "hyena": (hyena.Hyena, hyena.HyenaConfig, hyena.TOY, hyena.SPACE),
    "retnet": (retnet.RetNet, retnet.RetNetConfig, retnet.TOY, retnet.SPACE),
    "lcm-diffusion": (
        lcm_diffusion.LCMDiffusion,
        lcm_diffusion.LCMDiffusionConfig,
        lcm_diffusion.TOY,
        lcm_diffusion.SPACE,
    ),
    "lcm-quant": (lcm_quant.LCMQuant, lcm_quant.LCMQuantConfig, lcm_quant.TOY, lcm_quant.SPACE),
}

MODELS = {name: row[0] for name, row in _TABLE.items()}
CONFIGS = {name: row[1] for name, row in _TABLE.items()}
TOYS = {name: row[2] for name, row in _TABLE.items()}
SPACES = {name: row[3] for name, row in _TABLE.items()}
"""Sizes that `latent sweep` tries, by field of the config."""

ENSEMBLE = "ensemble"

ORIGINAL = ("amn", "lstm", "gru", "transformer")
"""The system this follows had these four; they ship and are what a command trains when it is not told."""


def build(name: str, sizes: dict[str, Any] | None = None, tmd: bool = False) -> Any:
    """A new, untrained predictor; `sizes` are fields of its config that differ from the default. tmd: it reads each
    vector's TMD code too (`lvm.models.codes`), whose prototypes are not loaded.

    Raises InputError for an unknown name, listing the known ones, and for an unknown size or one that does not fit.
    """
    if name == ENSEMBLE:
        return Ensemble(EnsembleConfig(**(sizes or {})), build)
    require_known(name)
    try:
        config = CONFIGS[name](**(sizes or {}))
        model = MODELS[name](config)
        if tmd:
            read_codes(model, config.dim, model.reads)
        return model
    except (TypeError, RuntimeError, ValueError, ZeroDivisionError) as err:
        raise InputError(f"sizes of model {name!r} do not fit this version: {err}") from err


def require_known(name: str) -> None:
    """Return when `name` is a predictor's, else raise InputError with the names there are."""
    if name not in MODELS:
        raise InputError(f"unknown model {name!r}; expected one of {', '.join(MODELS)}")
