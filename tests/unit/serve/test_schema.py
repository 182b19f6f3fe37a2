"""Vectors of requests."""

import base64

import numpy as np
import pytest

from serve.schema import RefusedError, pack, unpack

VECTOR = np.random.default_rng(0).standard_normal(768).astype(np.float32)


@pytest.mark.parametrize("form", ["float", "base64"])
def test_what_is_packed_unpacks_to_unit_norm(form: str) -> None:
    back = unpack([pack(VECTOR, form), pack(3 * VECTOR, form)], 768, "vectors")
    assert back.dtype == np.float32
    np.testing.assert_allclose(back, np.stack([VECTOR, VECTOR]) / np.linalg.norm(VECTOR), atol=1e-6)


def bad(value: float, place: int = 700) -> list[float]:
    vector = [0.1] * 768
    vector[place] = value
    return vector


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        (bad(float("nan")), "NaN"),
        (bad(float("inf")), "infinity"),
        (bad(-float("inf")), "infinity"),
        (bad(1e39), "beyond float32"),
        ([0.0] * 768, "all zero"),
        ([1e-30] * 768, "all zero"),
        ([0.1] * 767, "767 numbers, expected 768"),
        ([], "0 numbers, expected 768"),
        ("AAAA", "holds 3 bytes, expected 3072"),
        ("not base64!", "no base64"),
        (base64.b64encode(np.full(768, np.nan, "<f4").tobytes()).decode(), "NaN"),
    ],
)
def test_a_bad_vector_is_named(vector: list[float] | str, message: str) -> None:
    with pytest.raises(RefusedError, match=message) as error:
        unpack([[0.1] * 768, vector], 768, "vectors")
    assert error.value.status == 422
    assert "vectors[1]" in str(error.value)
