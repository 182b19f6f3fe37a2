"""Model records: complete or absent, found by alias, and no stranger's pickle is ever run."""

import contextlib
import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lvm.errors import InputError
from lvm.models import CONFIGS, MODELS, OPTIMIZED, TOYS, Predictor, build
from lvm.predict.record import (
    find_record,
    import_checkpoint,
    load_record,
    read_aliases,
    record_folders,
    resolve,
    save_record,
    series_of,
    set_alias,
)
from tests.doubles import FakeCodec

IDENTITY = FakeCodec().identity
METRICS = {"val_cosine": 0.512345, "epochs": 4, "curve": [{"epoch": 1, "val_cosine": 0.5}]}
PROVENANCE = {"Data source": "made up", "Sequences": "1,234 train windows", "Seed": "3"}


def toy(name: str = "lstm", seed: int = 0) -> Predictor:
    torch.manual_seed(seed)
    return MODELS[name](TOYS[name]).eval()


def save(models: Path, name: str = "lstm", seed: int = 0, **config: Any) -> Path:
    return save_record(models, name, toy(name, seed), IDENTITY, config, METRICS, PROVENANCE)


# ---- save and load


@pytest.mark.parametrize("name", MODELS)
def test_a_record_gives_back_the_model(name: str, tmp_path: Path) -> None:
    folder = save(tmp_path, name, run="abc")
    record = load_record(tmp_path, folder.name)
    contexts = torch.randn(2, 5, 768, generator=torch.Generator().manual_seed(1))
    assert torch.equal(record.model(contexts), toy(name)(contexts))
    assert not record.model.training
    assert record.name == name
    assert record.identity == IDENTITY
    assert record.metrics == METRICS
    assert record.config["run"] == "abc"
    assert record.config["parameters"] == sum(p.numel() for p in toy(name).parameters())


def test_a_record_is_four_files_under_a_name_that_sorts_by_time(tmp_path: Path) -> None:
    folder = save(tmp_path)
    assert {p.name for p in folder.iterdir()} == {
        "model.safetensors",
        "config.json",
        "metrics.json",
        "MODEL_CARD.md",
    }
    assert folder.name.startswith("lstm-2")
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]


def test_the_card_says_what_the_record_is_and_what_is_wrong_with_it(tmp_path: Path) -> None:
    folder = save_record(
        tmp_path, "lstm", toy(), IDENTITY, {}, METRICS, PROVENANCE, issues=("It was trained on a toy.",)
    )
    card = (folder / "MODEL_CARD.md").read_text()
    for part in ("made up", "1,234 train windows", str(IDENTITY), "0.5123", "Seed | 3", "Known issues"):
        assert part in card
    assert "It was trained on a toy." in card
    assert "mean of what may follow" in card


def test_a_failed_save_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        save_record(tmp_path, "lstm", toy(), IDENTITY, {"not json": object()}, METRICS, PROVENANCE)
    assert list(tmp_path.iterdir()) == []


# ---- aliases


def test_an_alias_moves_and_the_old_record_stays(tmp_path: Path) -> None:
    first, second = save(tmp_path, seed=1), save(tmp_path, seed=2)
    set_alias(tmp_path, "lstm", first)
    set_alias(tmp_path, "other", first)
    set_alias(tmp_path, "lstm", second)
    assert read_aliases(tmp_path) == {"lstm": second.name, "other": first.name}
    assert load_record(tmp_path, "lstm").folder == second
    assert load_record(tmp_path, first.name).folder == first


def test_an_alias_to_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="expected a record"):
        set_alias(tmp_path, "lstm", tmp_path / "empty")
    assert read_aliases(tmp_path) == {}


def test_an_unknown_model_is_answered_with_those_there_are(tmp_path: Path) -> None:
    folder = save(tmp_path)
    set_alias(tmp_path, "lstm", folder)
    with pytest.raises(InputError, match=rf"no model 'gru' in .*there are: lstm, {folder.name}"):
        load_record(tmp_path, "gru")
    with pytest.raises(InputError, match="there are: none yet"):
        load_record(tmp_path / "nowhere", "gru")


@pytest.mark.parametrize("name", ["..", "../other", "/etc", "."])
def test_a_name_is_no_path(name: str, tmp_path: Path) -> None:
    save(tmp_path / "models")
    with pytest.raises(InputError, match="no model"):
        resolve(tmp_path / "models", name)


def test_an_alias_whose_record_is_gone_says_so(tmp_path: Path) -> None:
    folder = save(tmp_path)
    set_alias(tmp_path, "lstm", folder)
    folder.rename(tmp_path / "moved")
    with pytest.raises(InputError, match=r"points to .* which does not exist"):
        load_record(tmp_path, "lstm")


def test_find_record_goes_by_config_and_takes_the_newest(tmp_path: Path) -> None:
    save(tmp_path, seed=1, run="a")
    wanted = save(tmp_path, seed=2, run="b")
    save(tmp_path, name="gru", run="b")
    assert find_record(tmp_path, "lstm", run="b") == wanted
    assert find_record(tmp_path, "lstm", run="c") is None
    damage_a_bit(wanted)
    assert find_record(tmp_path, "lstm", run="b") != wanted  # it is trained anew, or published again
    assert find_record(tmp_path / "nowhere", "lstm", run="b") is None
    assert len(record_folders(tmp_path)) == 3


# ---- damage


def damage_truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def damage_a_bit(folder: Path) -> None:
    """Still a file of finite numbers, and of other answers."""
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    path.write_bytes(data)


def damage_before_hashes(folder: Path) -> None:
    """A record of an older version, whose config.json has no hash."""
    damage_truncate(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["weights_sha256"]
    (folder / "config.json").write_text(json.dumps(config))


def damage_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model": "lstm"')


def damage_sizes(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["sizes"]["hidden"] = 64
    (folder / "config.json").write_text(json.dumps(config))


def damage_codec(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["codec"]["max_tokens"] = 64
    (folder / "config.json").write_text(json.dumps(config))


def damage_metrics(folder: Path) -> None:
    (folder / "metrics.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncate, r"model\.safetensors has SHA-256 .* damaged or replaced"),
        (damage_a_bit, r"model\.safetensors has SHA-256 .* damaged or replaced"),
        (damage_before_hashes, r"model\.safetensors cannot be read"),
        (damage_config, r"config\.json cannot be read"),
        (damage_sizes, r"model\.safetensors does not fit its architecture: lstm\.bias_hh_l0 is \(128,\)"),
        (damage_codec, "edited or damaged"),
        (damage_metrics, r"metrics\.json cannot be read"),
    ],
)
def test_a_damaged_record_is_refused(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    folder = save(tmp_path)
    damage(folder)
    with pytest.raises(InputError, match=message):
        load_record(tmp_path, folder.name)


# ---- checkpoints of the original system


def original_state(name: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    return dict(build(name).state_dict())


@pytest.mark.parametrize("name", [n for n in MODELS if n != OPTIMIZED])  # its tensors are the Transformer's
def test_an_original_checkpoint_is_imported_and_tells_its_architecture(name: str, tmp_path: Path) -> None:
    state = original_state(name)
    extra = {"pos_encoder.pe": torch.zeros(1, 100, 512)} if name == "transformer" else {}
    path = tmp_path / "best_model.pt"
    # As the original trainers wrote them: scores as numpy numbers, settings as a dict of plain values.
    content = {
        "epoch": 19,
        "model_state_dict": {**state, **extra},
        "val_cosine": np.float64(0.5758),
        "model_config": {"input_dim": 768},
    }
    torch.save(content, path)
    found, folder = import_checkpoint(path, tmp_path / "models", IDENTITY, {"seed": 1})
    record = load_record(tmp_path / "models", folder.name)
    assert found == record.name == name
    assert record.config["imported_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert record.config["seed"] == 1
    assert record.metrics == {"original_epoch": 19.0, "original_val_cosine": pytest.approx(0.5758)}
    again = record.model.state_dict()
    assert set(again) == set(state)
    assert all(torch.equal(again[k], v) for k, v in state.items())


def test_an_imported_model_is_scored_where_asked(tmp_path: Path) -> None:
    path = tmp_path / "best_model.pt"
    torch.save({"model_state_dict": original_state("amn")}, path)
    _, folder = import_checkpoint(
        path, tmp_path / "models", IDENTITY, score=lambda model: {"val_cosine": float(not model.training)}
    )
    assert load_record(tmp_path / "models", folder.name).metrics == {"val_cosine": 1.0}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_names_of_wrapped_models_are_understood(prefix: str, tmp_path: Path) -> None:
    path = tmp_path / "wrapped.pt"
    torch.save({"model_state_dict": {prefix + k: v for k, v in original_state("amn").items()}}, path)
    assert import_checkpoint(path, tmp_path / "models", IDENTITY)[0] == "amn"


class Hostile:
    """Pickles as a call that would write a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


def hostile_torch(path: Path, marker: Path) -> None:
    torch.save({"model_state_dict": {"a": torch.zeros(1)}, "hook": Hostile(marker)}, path)


def hostile_pickle(path: Path, marker: Path) -> None:
    path.write_bytes(pickle.dumps({"model_state_dict": Hostile(marker)}))


@pytest.mark.parametrize("write", [hostile_torch, hostile_pickle])
def test_a_hostile_checkpoint_is_refused_and_runs_nothing(
    write: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    path, marker = tmp_path / "model.pt", tmp_path / "was-run"
    write(path, marker)
    with pytest.raises(InputError, match=r"can run code.*save only the weights"):
        import_checkpoint(path, tmp_path / "models", IDENTITY)
    assert not marker.exists()
    assert not (tmp_path / "models").exists()
    # The same file does run code where pickle is trusted: the refusal above is no accident.
    with contextlib.suppress(RuntimeError):
        torch.load(path, weights_only=False)
    assert marker.exists()


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_text("hello")
    with pytest.raises(InputError, match=r"model\.pt"):
        import_checkpoint(path, tmp_path / "models", IDENTITY)
    with pytest.raises(InputError, match="not a checkpoint that torch can read"):
        import_checkpoint(tmp_path / "absent.pt", tmp_path / "models", IDENTITY)


def test_a_checkpoint_without_weights_says_what_it_has(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"weights": {}, "epoch": 1}, path)
    with pytest.raises(InputError, match=r"expected .*model_state_dict.*got weights, epoch"):
        import_checkpoint(path, tmp_path / "models", IDENTITY)


def test_weights_of_another_network_name_the_nearest_and_what_differs(tmp_path: Path) -> None:
    state = original_state("lstm")
    state["lstm.weight_ih_l2"] = state.pop("lstm.weight_hh_l1")
    path = tmp_path / "model.pt"
    torch.save({"model_state_dict": state}, path)
    with pytest.raises(InputError, match=r"nearest is lstm.*weight_hh_l1.*weight_ih_l2"):
        import_checkpoint(path, tmp_path / "models", IDENTITY)


def test_weights_of_another_size_name_the_tensor(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = tmp_path / "model.pt"
    torch.save({"model_state_dict": MODELS["gru"](CONFIGS["gru"](hidden=256)).state_dict()}, path)
    with pytest.raises(InputError, match=r"blocks\.0\.gru\.bias_hh_l0 is \(768,\), expected \(1536,\)"):
        import_checkpoint(path, tmp_path / "models", IDENTITY)


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    state = original_state("amn")
    state["query_encoder.bias"][3] = float("nan")
    path = tmp_path / "model.pt"
    torch.save({"model_state_dict": state}, path)
    with pytest.raises(InputError, match=r"query_encoder\.bias holds NaN"):
        import_checkpoint(path, tmp_path / "models", IDENTITY)


# ---- series


def saved_seed(models: Path, seed: int, draw: int, **config: Any) -> Path:
    """A record trained with this seed, whose weights and so its name differ by `draw`."""
    return save_record(
        models, "lstm", toy(seed=draw), IDENTITY, {"seed": seed, **config}, METRICS, PROVENANCE
    )


def test_a_series_is_the_records_that_differ_in_the_trainings_seed_alone(tmp_path: Path) -> None:
    before_there_were_series = saved_seed(tmp_path, 0, 0, run="a")
    second = saved_seed(tmp_path, 0, 1, run="b", series="a", training_seed=1)
    saved_seed(tmp_path, 0, 2, run="c", series="c")
    save_record(tmp_path, "gru", toy("gru"), IDENTITY, {"seed": 0, "series": "a"}, METRICS, PROVENANCE)
    for folder in (before_there_were_series, second):
        found = series_of(tmp_path, load_record(tmp_path, folder.name))
        assert found == [before_there_were_series, second]
    # An imported checkpoint was trained who knows how.
    imported = saved_seed(tmp_path, 0, 3)
    assert series_of(tmp_path, load_record(tmp_path, imported.name)) == [imported]
