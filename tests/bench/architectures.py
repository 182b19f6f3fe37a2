"""Every architecture's speed, and what each way of mixing places costs in time and memory as contexts grow.

    python -m tests.bench.architectures
    python -m tests.bench.architectures --output tests/bench/results   # and a plot, mixers_<date>.png

- A whole model at its default size, contexts of 5, random weights: milliseconds a query at batch 1 and at batch 128.
- One mixer alone, the first of each model, on (1, T, W) for T from 8 to 2,048: milliseconds, and the most memory that
  one call holds beyond the weights. Beside them exact causal attention of the same width.

float32, the machine alone. What limits: at batch 1 and short contexts the number of calls, else matrix products; s4 and
hyena transform the whole length, rwkv's and retnet's parallel forms are quadratic in it.

Tables on stderr; the last line of stdout is one JSON object.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lvm.evaluate.metrics import measure_latency, peak_bytes
from lvm.evaluate.scoring import model_predictor
from lvm.evaluate.table import Table, as_text
from lvm.models import CONFIGS, MODELS, Trunk
from lvm.models.attention import CausalAttention
from lvm.predict.training import OWN_RECIPES

LENGTHS = (8, 32, 128, 512, 1024, 2048)
CONTEXT = 5


def whole_models(budget_s: float) -> dict[str, dict[str, Any]]:
    """Parameters and milliseconds a query of every architecture."""
    found = {}
    for name in (n for n in MODELS if n not in OWN_RECIPES):
        torch.manual_seed(0)
        model = MODELS[name](CONFIGS[name]()).eval()
        predict = model_predictor(model, torch.device("cpu"))
        one, many = (measure_latency(predict, CONTEXT, 768, b, budget_s=budget_s) for b in (1, 128))
        found[name] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "ms_1": one.p50_ms,
            "ms_128": many.p50_ms / 128,
        }
    return found


def mixers() -> dict[str, tuple[torch.nn.Module, int]]:
    """The first mixer of each model with the shared residual stream and its width W, and exact attention."""
    torch.manual_seed(0)
    models = {name: MODELS[name](CONFIGS[name]()).eval() for name in MODELS}
    found: dict[str, tuple[torch.nn.Module, int]] = {"attention": (CausalAttention(512, 64), 512)}
    for name, model in models.items():
        if isinstance(model, Trunk) and name not in ("gpt2", "hybrid", "lcm-diffusion", "lcm-quant"):
            mixer = model.branches[0].mixer
            assert isinstance(mixer, torch.nn.Module)
            found[name] = mixer, model.config.width
    return found


def cost(mixer: torch.nn.Module, width: int, length: int, budget_s: float) -> dict[str, float]:
    """p50 milliseconds and peak megabytes of one call on (1, length, W)."""
    x = torch.randn(1, length, width, generator=torch.Generator().manual_seed(0))

    @torch.inference_mode()
    def call(_: Any = None) -> Any:
        return mixer(x)[0]

    call()
    times, began = [], time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - began < budget_s and len(times) < 200):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1000)
    return {"ms": float(np.median(times)), "mb": peak_bytes(call, 1, 1, 1, "cpu") / 2**20}


def draw(costs: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Time and memory against the length, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    for key, label, axis in (("ms", "milliseconds", axes[0]), ("mb", "MiB beyond the weights", axes[1])):
        for name, rows in costs.items():
            exact = name == "attention"
            axis.plot(
                LENGTHS, [r[key] for r in rows], label=name, lw=3 if exact else 1.4, c="k" if exact else None
            )
        axis.set(xscale="log", yscale="log", xlabel="places T", ylabel=label, title=f"One mixer: {label}")
        axis.set_xticks(LENGTHS, [str(t) for t in LENGTHS])
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=None, help="folder for the plot")
    parser.add_argument("--seconds", type=float, default=1.0, help="longest time of each measurement")
    options = parser.parse_args()
    models = whole_models(options.seconds)
    rows = [
        (
            n,
            f"{m['parameters']:,}",
            f"{m['ms_1']:.2f}",
            f"{m['ms_128']:.3f}",
            f"{m['ms_1'] / m['ms_128']:.0f}",
        )
        for n, m in models.items()
    ]
    headers = ("model", "parameters", "ms alone", "ms at 128", "times")
    print(as_text(Table("Whole models", headers, tuple(rows))), file=sys.stderr)
    costs = {name: [cost(m, w, t, options.seconds) for t in LENGTHS] for name, (m, w) in mixers().items()}
    for key, title in (("ms", "One mixer, milliseconds"), ("mb", "One mixer, MiB beyond the weights")):
        cells = tuple((n, *(f"{r[key]:.2f}" for r in some)) for n, some in costs.items())
        table = Table(title, ("mixer", *(str(t) for t in LENGTHS)), cells)
        print("\n" + as_text(table), file=sys.stderr)
    if options.output is not None:
        draw(costs, options.output / f"mixers_{time.strftime('%Y-%m')}.png")
    print(
        json.dumps(
            {"models": models, "mixers": costs, "lengths": LENGTHS, "threads": torch.get_num_threads()}
        )
    )


if __name__ == "__main__":
    main()
