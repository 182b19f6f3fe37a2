"""Ensembles of trained predictors: which ones, and how much each counts.

Members are the best by val cosine. Their weights are learned on the first half of the validation windows and kept where
they beat the plain mean on the second half; articles are in order, so the halves share one at most.

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
"""Validation windows the weights are learned and judged on, evenly spaced over all."""

STEPS, RATE = 200, 0.05
"""Of Adam, for M numbers."""


def make_ensemble(
    models: Location, array: VectorArray, members: Mapping[str, str], most: int
) -> tuple[Location, bool]:
    """The record of an ensemble of the best `most` members (name to folder of a record), and whether it was there.

    The alias does not move. Members of different context lengths each read their own last vectors of windows as long as
    the longest. Raises InputError with fewer than two members, and when they do not share vectors, filters and split.
    """
    found = [load_record(models, folder) for folder in members.values()]
    chosen = sorted(found, key=lambda r: -float(r.metrics.get("val_cosine", -1.0)))[:most]
    if len(chosen) < 2:
        raise InputError(f"expected at least 2 trained models for an ensemble, got {len(chosen)}")
    shared = _shared(chosen, array)
    folders = [r.folder.name for r in chosen]
    there = find_record(models, ENSEMBLE, members=folders)
    if there is not None:
        return there, True

    val = make_windows(array, WindowSettings(**shared["windows"])).split(shared["seed"])["val"]
    predicted, truth = _predictions(chosen, spread_batches(val, MAX_VAL_WINDOWS))
    parts = [
        {"model": r.name, "sizes": r.config["sizes"], "context": r.context}
        | ({"tmd": True} if "tmd" in r.config else {})
        for r in chosen
    ]
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
    folder = save_record(
        models, ENSEMBLE, model, array.identity, {**shared, "members": folders}, metrics, provenance, issues
    )
    return folder, False


def learn_weights(predicted: Tensor, truth: Tensor) -> Tensor:
    """(M,) numbers whose softmax weighs the members (M, V, D) for the best mean cosine with the truth (V, D)."""
    logits = torch.zeros(len(predicted), requires_grad=True)
    optimiser = torch.optim.Adam([logits], lr=RATE)
    # cosine(sum of w p, t) needs the products of members and truth alone.
    with_truth = torch.einsum("mvd,vd->vm", predicted, truth)
    among = torch.einsum("mvd,nvd->vmn", predicted, predicted)
    for _ in range(STEPS):
        weights = logits.softmax(dim=0)
        length = torch.einsum("m,vmn,n->v", weights, among, weights).clamp_min(1e-12).sqrt()
        loss = -(with_truth @ weights / length).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return logits.detach()


def cosine_of(logits: Tensor, predicted: Tensor, truth: Tensor) -> float:
    """Mean cosine with the truth (V, D) of members (M, V, D) combined by these numbers (M,)."""
    combined = torch.einsum("m,mvd->vd", logits.softmax(dim=0), predicted)
    return float(F.cosine_similarity(combined, truth).mean())


@torch.inference_mode()
def _predictions(records: list[Record], batches: Any) -> tuple[Tensor, Tensor]:
    """(M, V, D) and (V, D)."""
    rows, truths = [], []
    for contexts, targets in batches:
        x = torch.from_numpy(contexts)
        rows.append(torch.stack([r.model(x[:, -r.context :]).float() for r in records]))
        truths.append(torch.from_numpy(targets))
    return torch.cat(rows, dim=1).clone(), torch.cat(truths)


def _shared(records: list[Record], array: VectorArray) -> dict[str, Any]:
    """What all records say of vectors, windows and seed. Raises InputError naming one that differs."""
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
    longest = max(record.context for record in records)
    return {
        "windows": {**first["windows"], "context": longest},
        "seed": first["seed"],
        "vectors": first["vectors"],
    }
