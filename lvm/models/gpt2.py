"""GPT-2 over vectors: DistilGPT-2's layers without token embeddings and language-model head.

Radford et al. 2019, with DistilGPT-2's sizes (Sanh et al. 2019: 6 layers of width 768, 12 heads). Choices: linear
layers replace the embeddings and the head; learned position embeddings, the last of which serves all later positions.
`load_layers` loads the layers, the position embeddings and the final norm of a checkpoint in GPT-2's layout.

Letters: B batch, T positions, W width.
"""

import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lvm.errors import InputError
from lvm.models.attention import CausalAttention
from lvm.models.trunk import Trunk, TrunkConfig, wide, with_feed_forward


@dataclass(frozen=True)
class GPT2Config(TrunkConfig):
    """Sizes of the network."""

    width: int = 768
    num_layers: int = 6
    head_dim: int = 64
    """Must divide the width."""
    num_positions: int = 1024
    """Learned position embeddings."""


TOY = GPT2Config(width=32, num_layers=2, head_dim=16, num_positions=8)
SPACE = {"width": (256, 512, 768), "num_layers": (4, 5, 6)}


class GPT2(Trunk):
    """Next vector from the last position of GPT-2's layers."""

    def __init__(self, config: GPT2Config) -> None:
        attention = partial(CausalAttention, config.width, config.head_dim)
        mixers = with_feed_forward(config, attention, approximate="tanh")
        super().__init__(config, mixers)
        self.place = nn.Parameter(torch.randn(config.num_positions, config.width) * 0.02)
        self._scale: float | None = None
        for mixer in mixers:
            for module in mixer.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=0.02)
                    nn.init.zeros_(module.bias)
            # The output of each layer is scaled by the number of layers (GPT-2's report, section 2.3).
            last = mixer.get_parameter("out.weight")
            nn.init.normal_(last, std=0.02 / math.sqrt(2 * config.num_layers))

    def embed(self, vectors: Tensor, start: int = 0) -> Tensor:
        """(B, T, W) inputs of the first layer from vectors (B, T, D) at positions `start` and after."""
        places = torch.arange(start, start + vectors.shape[1], device=vectors.device)
        inputs = wide(self.input_proj(vectors))
        return inputs + self.place[places.clamp(max=len(self.place) - 1)]

    @torch.no_grad()
    def start_from(self, directions: Tensor) -> None:
        """As the trunk's. Loaded layers are kept, and the inputs are scaled to the norm of GPT-2's embeddings."""
        if self._scale is None:
            super().start_from(directions)
            return
        self.input_proj.weight.copy_(directions * self._scale)
        self.input_proj.bias.zero_()
        self.pool.fill_(1.0)

    @torch.no_grad()
    def load_layers(self, folder: Path) -> None:
        """Load layers, position embeddings and final norm of `model.safetensors` in GPT-2's layout.

        Raises InputError when the file cannot be read or a tensor is missing or has another shape.
        """
        path = folder / "model.safetensors"
        try:
            tensors = {k.removeprefix("transformer."): v for k, v in load_file(path).items()}
        except (OSError, SafetensorError) as err:
            raise InputError(
                f"{path} cannot be read ({err}); expected a checkpoint in GPT-2's layout, such as distilgpt2's"
            ) from err

        def take(parameter: Tensor, name: str) -> None:
            value = tensors.get(name)
            if value is not None and name.endswith("weight") and value.ndim == 2 and name != "wpe.weight":
                value = value.T  # GPT-2 stores linear layers as (in, out)
            if value is None or value.shape != parameter.shape:
                got = "none" if value is None else tuple(value.shape)
                raise InputError(f"{path}: expected {name} of shape {tuple(parameter.shape)}, got {got}")
            parameter.copy_(value)

        take(self.place, "wpe.weight")
        attention = {"norm": "ln_{}", "mixer.qkv": "attn.c_attn", "mixer.out": "attn.c_proj"}
        feed_forward = {"norm": "ln_{}", "mixer.up": "mlp.c_fc", "mixer.out": "mlp.c_proj"}
        for number, branch in enumerate(self.branches):
            layer, second = divmod(number, 2)
            for ours, theirs in (feed_forward if second else attention).items():
                for kind in ("weight", "bias"):
                    name = f"h.{layer}.{theirs.format(second + 1)}.{kind}"
                    take(branch.get_parameter(f"{ours}.{kind}"), name)
        for kind in ("weight", "bias"):
            take(self.norm.get_parameter(kind), f"ln_f.{kind}")
        wte = tensors.get("wte.weight")
        self._scale = math.sqrt(self.config.width) if wte is None else float(wte.norm(dim=1).mean())


def sizes_of(folder: Path) -> dict[str, int]:
    """GPT2Config's fields for a checkpoint in GPT-2's layout. Raises InputError without a config.json of GPT-2."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
        width, num_heads = int(config["n_embd"]), int(config["n_head"])
        return {
            "width": width,
            "num_layers": int(config["n_layer"]),
            "head_dim": width // num_heads,
            "num_positions": int(config["n_positions"]),
        }
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise InputError(
            f"{path} cannot be read ({err!r}); expected the config.json of a GPT-2 checkpoint"
        ) from err
