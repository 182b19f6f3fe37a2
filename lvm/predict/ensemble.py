"""Weighted ensembles of trained predictors.

The members are the best models by val cosine. Their weights are learned on the first half of the validation windows
and used if they beat equal weights on the second; windows are in article order, so the halves share at most one
article.

Letters: V windows, M members, D vector length.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lvm.errors import InputError
from lvm.models import ENSEMBLE, Ensemble, EnsembleConfig, build
from lvm.predict.record import Record, find_record, load_record, save_record
from lvm.predict.start import spread_batches
from lvm.storage import Location
from lvm.vectors.array import VectorArray
from lvm.vectors.sequences import WindowSettings, make_windows

MAX_VAL_WINDOWS = 8192
"""Maximum validation windows to learn and test the weights on, evenly spaced."""

STEPS, RATE = 200, 0.05
"""Steps and learning rate of Adam for the M weights."""


def make_ensemble(
    models: Location, array: VectorArray, members: Mapping[str, str], max_members: int
) -> tuple[Location, bool]:
    """The record of an ensemble of the best `members` (name to record folder), and whether it existed already.

    The alias is not changed. Windows have the longest context of any member; each reads the last vectors that it needs.
    Raises InputError if there are fewer than two members, or they do not share vectors, filters and split.
    """
    found = [load_record(models, folder) for folder in members.values()]
    chosen = sorted(found, key=lambda r: -float(r.metrics.get("val_cosine", -1.0)))[:max_members]
    if len(chosen) < 2:
        raise InputError(f"expected at least 2 trained models for an ensemble, got {len(chosen)}")
    shared = _shared(chosen, array)
    folders = [r.folder.name for r in chosen]
    existing = find_record(models, ENSEMBLE, members=folders)
    if existing is not None:
        return existing, True

    val = make_windows(array, WindowSettings(**shared["windows"])).split(shared["seed"])["val"]
    predicted, truth = _predictions(chosen, spread_batches(val, MAX_VAL_WINDOWS))
    parts = [{"model": r.name, "sizes": r.config["sizes"], "context": r.context} for r in chosen]
    for part, record in zip(parts, chosen, strict=True):
        if "tmd" in record.config:
            part["tmd"] = True
    config = EnsembleConfig(dim=array.identity.dim, members=parts)
    model = Ensemble(config, build)
    for ours, record in zip(model.members, chosen, strict=True):
        ours.load_state_dict(record.model.state_dict())
    half = len(truth) // 2
    learned = learn_weights(predicted[:, :half], truth[:half])
    mean_cosine = cosine_of(torch.zeros(len(chosen)), predicted[:, half:], truth[half:])
    learned_cosine = cosine_of(learned, predicted[:, half:], truth[half:])
    if learned_cosine > mean_cosine:
        model.logits.data.copy_(learned)
    alone = [F.cosine_similarity(p, truth).mean().item() for p in predicted]
    combined = cosine_of(model.logits.detach(), predicted, truth)
    metrics = {
        "val_cosine": combined,
        "val_loss": 2.0 - 2.0 * combined,
        "best_member_val_cosine": max(alone),
        "second_half": {"mean": mean_cosine, "learned_weights": learned_cosine},
        "members": dict(zip(folders, alone, strict=True)),
        "weights": [round(w, 4) for w in model.weights.tolist()],
        "val_windows": len(truth),
    }
    provenance = {
        "Members": ", ".join(folders),
        "Weights": "learned on the first half of the validation windows"
        if learned_cosine > mean_cosine
        else "equal: learned ones were no better on the second half of the validation windows",
        "Vectors": f"fingerprint {array.fingerprint}",
        "Seed": str(shared["seed"]),
    }
    issues = ("Its members and weights were chosen on the validation windows its val cosine is measured on.",)
    entries = {**shared, "members": folders}
    return save_record(models, ENSEMBLE, model, array.identity, entries, metrics, provenance, issues), False


def learn_weights(predicted: Tensor, truth: Tensor) -> Tensor:
    """(M,) logits whose softmax weighs the predictions (M, V, D) for the best mean cosine to the targets (V, D)."""
    logits = torch.zeros(len(predicted), requires_grad=True)
    optimiser = torch.optim.Adam([logits], lr=RATE)
    # The cosine of a weighted sum needs only inner products, computed once.
    with_truth = torch.einsum("mvd,vd->vm", predicted, truth)
    between = torch.einsum("mvd,nvd->vmn", predicted, predicted)
    for _ in range(STEPS):
        weights = logits.softmax(dim=0)
        length = torch.einsum("m,vmn,n->v", weights, between, weights).clamp_min(1e-12).sqrt()
        loss = -(with_truth @ weights / length).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return logits.detach()


def cosine_of(logits: Tensor, predicted: Tensor, truth: Tensor) -> float:
    """Mean cosine to the targets (V, D) of the predictions (M, V, D) weighted with the softmax of these logits (M,)."""
    combined = torch.einsum("m,mvd->vd", logits.softmax(dim=0), predicted)
    return float(F.cosine_similarity(combined, truth).mean())


@torch.inference_mode()
def _predictions(records: list[Record], batches: Any) -> tuple[Tensor, Tensor]:
    """Predictions (M, V, D) and targets (V, D)."""
    rows, truths = [], []
    for contexts, targets in batches:
        x = torch.from_numpy(contexts)
        rows.append(torch.stack([r.model(x[:, -r.context :]).float() for r in records]))
        truths.append(torch.from_numpy(targets))
    return torch.cat(rows, dim=1).clone(), torch.cat(truths)


def _shared(records: list[Record], array: VectorArray) -> dict[str, Any]:
    """Vectors, windows and seed that all records share. Raises InputError naming one that differs."""
    first = records[0].config
    for record in records:
        array.require_codec(record.identity, f"model {record.folder.name}")
        config = record.config
        if config.get("vectors", {}).get("fingerprint") != array.fingerprint:
            raise InputError(
                f"{record.folder.name} was trained on other vectors than {array.directory}; an ensemble's members must "
                "share their test articles"
            )
        own, others = ({**c["windows"], "context": 0, "seed": c["seed"]} for c in (config, first))
        if own != others:
            raise InputError(
                f"{record.folder.name} has windows and seed {own}, {records[0].folder.name} has {others}; "
                "an ensemble's members must share filters and split"
            )
    windows = {**first["windows"], "context": max(record.context for record in records)}
    return {"windows": windows, "seed": first["seed"], "vectors": first["vectors"]}
