"""`mini`'s decode where a device has no complex numbers (MPS): the same texts, and no complex number on the way."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lvm.codec import inverter, unbind
from lvm.codec.inverter import MiniHypothesizing, write
from lvm.codec.mini import (
    MiniEncoder,
    MiniHypothesizer,
    conjugate,
    flat,
    paired,
    square,
    times,
    unflat,
    unpaired,
)
from lvm.codec.unbind import Unbinder
from lvm.codec.zoo import Codec, load_codec
from lvm.devices import has_complex
from tests.unit.codec.test_unbind import END, TOY, encode, spoilt, texts


class WithoutComplex(TorchDispatchMode):
    """A device that refuses every operation with a complex number in or out."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(isinstance(t, Tensor) and t.is_complex() for t in tree_leaves((args, kwargs, out))):
            raise NotImplementedError(f"{func} with complex numbers")
        return out


def test_complex_numbers_are_where_torch_has_them() -> None:
    assert [has_complex(torch.device(d)) for d in ("cpu", "cuda", "mps")] == [True, True, False]


def test_pairs_of_reals_are_the_complex_numbers() -> None:
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(2, 5, 7, 12, generator=generator)
    z, w = paired(x), paired(y)
    with WithoutComplex():
        a, b = paired(x, real=True), paired(y, real=True)
        product, back = times(a, b), times(times(a, b), conjugate(b))
        torch.testing.assert_close(unpaired(a), x)
        torch.testing.assert_close(unflat(flat(a), real=True), a)
        torch.testing.assert_close(square(a), x[..., :6] ** 2 + x[..., 6:] ** 2)
    torch.testing.assert_close(torch.view_as_complex(product), z * w)
    torch.testing.assert_close(torch.view_as_complex(back.contiguous()), z * w * w.conj())
    torch.testing.assert_close(unflat(flat(z)), z)
    torch.testing.assert_close(square(z), square(a))
    torch.testing.assert_close(unpaired(times(z, conjugate(w))), unpaired(times(a, conjugate(b))))


@pytest.fixture(scope="module")
def networks() -> tuple[MiniEncoder, MiniHypothesizer]:
    torch.manual_seed(4)
    encoder = MiniEncoder(TOY).eval()
    return encoder, MiniHypothesizer(TOY, encoder.topic_norm).eval()


def both(networks: tuple[MiniEncoder, MiniHypothesizer], work: Callable[[bool], Any]) -> Any:
    """What `work` gives with complex numbers; with reals it gives the same and meets none."""
    wanted = work(False)
    with WithoutComplex():
        assert work(True) == wanted
    with pytest.raises(NotImplementedError, match="with complex numbers"), WithoutComplex():
        work(False)
    return wanted


def test_the_corrector_step_gives_the_same_texts(networks: tuple[MiniEncoder, MiniHypothesizer]) -> None:
    rows = texts(48)
    vectors = encode(networks[0], rows)
    exchanged = [[row[2], row[1], row[0], *row[3:]] for row in rows]
    frequencies = [-math.log(TOY.vocabulary_size)] * TOY.vocabulary_size

    def judged(real: bool) -> Any:
        unbinder = Unbinder(*networks, frequencies, END, real=real)
        wrong = unbinder.judge(vectors, spoilt(rows, 2)), unbinder.judge(vectors, exchanged)
        return wrong, unbinder.blends(torch.cat((vectors, vectors.roll(1, 0) + vectors))).tolist()

    (spoiled, _), blends = both(networks, judged)
    assert sum(a == b for a, b in zip(spoiled[0], rows, strict=True)) >= 46
    assert set(blends) == {False, True}


def test_the_writer_gives_the_same_texts(networks: tuple[MiniEncoder, MiniHypothesizer]) -> None:
    encoder, hypothesizer = networks
    vectors = encode(encoder, texts(24, seed=5))
    frequencies = [-math.log(TOY.vocabulary_size)] * TOY.vocabulary_size

    def written(real: bool) -> list[list[int]]:
        foresee = Unbinder(encoder, hypothesizer, frequencies, END, real=real).foresee
        parts = MiniHypothesizing(hypothesizer, encoder, END, "float32", foresee, real=real)
        with torch.inference_mode():
            return write(parts.writer(vectors, TOY.max_tokens), len(vectors), TOY.max_tokens, END)

    assert len({tuple(row) for row in both(networks, written)}) > 20


def test_the_shipped_codec_decodes_without_complex_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = [
        "The steam engine was first used to pump water out of mines.",
        "Coal was burnt to heat the boiler.",
    ]

    def decoded(codec: Codec) -> list[list[str]]:
        assert codec.inverter is not None
        return [[i.text for i in codec.inverter.invert(vectors, steps)] for steps in (0, 1)]

    usual = load_codec("mini", precision="float32")
    vectors = np.ascontiguousarray(usual.encode_chunks(chunks).vectors)
    wanted = decoded(usual)
    assert wanted[1] == chunks
    for module in (inverter, unbind):
        monkeypatch.setattr(module, "has_complex", lambda device: False)
    with WithoutComplex():
        real = load_codec("mini", precision="float32")
        torch.testing.assert_close(real.encode_chunks(chunks).vectors, vectors)
        assert decoded(real) == wanted
    with pytest.raises(NotImplementedError, match="with complex numbers"), WithoutComplex():
        decoded(usual)
