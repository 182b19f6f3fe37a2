"""TMD codes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvm.errors import InputError
from lvm.vectors.tmd import FEATURES, SIZES, Tmd, all_labels, labels, nearest, unpack

codes = st.builds(Tmd, *(st.integers(0, size - 1) for size in SIZES))


def test_there_are_16_domains_32_tasks_and_64_modifiers() -> None:
    assert tuple(map(len, labels())) == SIZES
    assert labels()[0][0] == "Science"
    assert labels()[0][15] == "Software"
    assert len(set(all_labels())) >= 100


def test_each_part_has_its_bits() -> None:
    assert Tmd(15, 0, 0).code == 0b1111_00000_000000_0
    assert Tmd(0, 31, 0).code == 0b0000_11111_000000_0
    assert Tmd(0, 0, 63).code == 0b0000_00000_111111_0
    assert Tmd(1, 2, 3).names == (labels()[0][1], labels()[1][2], labels()[2][3])


@given(codes)
def test_packing_and_unpacking_are_inverse(tmd: Tmd) -> None:
    assert unpack(tmd.code) == tmd
    bits = tmd.features()
    assert bits.shape == (FEATURES,)
    assert int("".join(str(int(b)) for b in bits), 2) == tmd.code


@pytest.mark.parametrize("code", [-2, 1, 65535, 65536])
def test_what_is_no_code_is_refused(code: int) -> None:
    with pytest.raises(InputError, match="expected an even number"):
        unpack(code)


@pytest.mark.parametrize("parts", [(16, 0, 0), (0, 32, 0), (0, 0, 64), (-1, 0, 0)])
def test_a_part_out_of_range_is_refused(parts: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match="expected 0 to"):
        Tmd(*parts)


def test_the_nearest_label_of_each_axis_wins() -> None:
    vectors = np.eye(sum(SIZES), dtype=np.float32)
    text = (vectors[5] * 0.9 + vectors[16 + 7] * 0.8 + vectors[48 + 9] * 0.7)[None]
    ((tmd, scores),) = nearest(text, vectors)
    assert tmd == Tmd(5, 7, 9)
    assert scores == pytest.approx((0.9, 0.8, 0.7))
    with pytest.raises(InputError, match="expected 112"):
        nearest(text, vectors[:10])
