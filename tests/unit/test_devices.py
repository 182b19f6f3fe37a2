"""Where torch computes, on nodes with CUDA, with an Apple GPU and with none; none of them is needed here."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from jobs import _ray
from lvm.devices import device_for_mini, pick_device, seen_gpu
from lvm.errors import InputError

BACKENDS = ("cuda", "mps", "")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kind of GPU that torch says it sees."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param == "cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: request.param == "mps")
    return str(request.param)


def test_auto_takes_what_there_is_and_without_a_reservation_the_cpu(backend: str) -> None:
    assert seen_gpu() == backend
    assert pick_device().type == (backend or "cpu")
    assert pick_device("auto", reserved=False).type == "cpu"
    for name in ("cpu", "cuda", "mps"):
        assert pick_device(name).type == pick_device(name, reserved=False).type == name  # asked for by name
    with pytest.raises(InputError, match="unknown device 'gpu'; expected auto, cpu, cuda or mps"):
        pick_device("gpu")


def test_mini_leaves_an_apple_gpu_alone_unless_asked(backend: str) -> None:
    assert device_for_mini().type == ("cuda" if backend == "cuda" else "cpu")
    assert device_for_mini("auto", reserved=False).type == "cpu"
    assert device_for_mini("mps").type == "mps"


def test_mini_is_loaded_on_the_cpu_of_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    from lvm.codec.zoo import load_codec

    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    codec = load_codec("mini")
    assert codec.encode_chunks(["a text"]).vectors.shape == (1, 768)


def test_a_replica_takes_the_gpu_that_it_reserved_and_no_other(backend: str) -> None:
    from serve.settings import Scale, device_of

    assert device_of(Scale(num_gpus=0)) == "cpu"
    assert device_of(Scale(num_gpus=0.25)) == (backend or "cpu")


def test_encoder_and_decoder_replicas_load_where_they_may(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from serve import settings

    asked: list[str] = []

    def load(*_: Any, device: str, **__: Any) -> SimpleNamespace:
        asked.append(device)
        return SimpleNamespace()

    monkeypatch.setattr(settings, "load_codec", load)
    args = settings.ServeArgs(codec="mini")
    settings.load_served(args, settings.Scale(num_gpus=0))
    settings.load_served(args, settings.Scale(num_gpus=1))
    assert asked == ["cpu", "auto"]


@pytest.mark.parametrize("gpus", [[], [0]], ids=["none reserved", "one reserved"])
@pytest.mark.parametrize("worker", [True, False], ids=["worker", "driver"])
def test_a_jobs_process_computes_where_ray_put_it(
    backend: str, gpus: list[int], worker: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    mode = ray.WORKER_MODE if worker else ray.SCRIPT_MODE
    context = SimpleNamespace(worker=SimpleNamespace(mode=mode))
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(ray, "get_gpu_ids", lambda: gpus)
    free = bool(gpus) or not worker
    assert _ray.worker_device().type == (backend if free and backend else "cpu")
    assert _ray.worker_device(mini=True).type == ("cuda" if free and backend == "cuda" else "cpu")
    # The CPU does the work, and it is said, only where Ray gave a GPU that torch does not see: not on a Mac.
    assert ("using the CPU" in _ray.unseen_gpu()) == (bool(gpus) and not backend)
