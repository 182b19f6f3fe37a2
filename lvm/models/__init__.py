"""Predictors: context vectors (B, T, D) in, the next vector (B, D) out, all of norm 1.

`MODELS[name](CONFIGS[name]())` has the default sizes, `MODELS[name](TOYS[name])` is tiny. An `ensemble` combines
trained predictors; it is not in MODELS, as it is not trained itself, but `build` makes it.

An architecture may define, for the training loop: `loss(contexts, targets)`, a scalar that replaces the mean squared
error; `prepare(targets)`, called once before the first step with batches of training targets; and
`solves_output = False` where its output layer cannot be initialised by regression.
"""

from collections.abc import Callable
from types import ModuleType
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

_TABLE: dict[str, tuple[ModuleType, Callable[[Any], Architecture], type[Any]]] = {
    "amn": (amn, AMN, AMNConfig),
    "lstm": (lstm, LSTM, LSTMConfig),
    "gru": (gru, GRU, GRUConfig),
    "transformer": (transformer, Transformer, TransformerConfig),
    OPTIMIZED: (transformer, Transformer, TransformerConfig),
    "mamba2": (mamba2, mamba2.Mamba2, mamba2.Mamba2Config),
    "s4": (s4, s4.S4, s4.S4Config),
    "rwkv": (rwkv, rwkv.RWKV, rwkv.RWKVConfig),
    "hybrid": (hybrid, hybrid.Hybrid, hybrid.HybridConfig),
    "gpt2": (gpt2, gpt2.GPT2, gpt2.GPT2Config),
    "linformer": (linformer, linformer.Linformer, linformer.LinformerConfig),
    "performer": (performer, performer.Performer, performer.PerformerConfig),
    "hyena": (hyena, hyena.Hyena, hyena.HyenaConfig),
    "retnet": (retnet, retnet.RetNet, retnet.RetNetConfig),
    "lcm-diffusion": (lcm_diffusion, lcm_diffusion.LCMDiffusion, lcm_diffusion.LCMDiffusionConfig),
    "lcm-quant": (lcm_quant, lcm_quant.LCMQuant, lcm_quant.LCMQuantConfig),
}

MODELS = {name: model for name, (_, model, _) in _TABLE.items()}
CONFIGS = {name: config for name, (_, _, config) in _TABLE.items()}
TOYS: dict[str, Any] = {name: module.TOY for name, (module, _, _) in _TABLE.items()}
SPACES: dict[str, dict[str, tuple[Any, ...]]] = {name: m.SPACE for name, (m, _, _) in _TABLE.items()}
"""Sizes that `latent sweep` tries, by field of the config."""

ENSEMBLE = "ensemble"

ORIGINAL = ("amn", "lstm", "gru", "transformer")
"""The four architectures of the original system, the default of training."""


def build(name: str, sizes: dict[str, Any] | None = None, tmd: bool = False) -> Any:
    """A new, untrained predictor.

    sizes: fields of its config that differ from the default. tmd: also read each vector's TMD code
    (`lvm.models.codes`); the prototypes are zeros until loaded. Raises InputError for an unknown name, listing the
    known ones, and for an unknown or invalid size.
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
    """Raise InputError, listing the known names, unless `name` is one of MODELS."""
    if name not in MODELS:
        raise InputError(f"unknown model {name!r}; expected one of {', '.join(MODELS)}")
