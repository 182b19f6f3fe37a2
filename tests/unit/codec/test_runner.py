"""Stacks prepared for inference against the stacks themselves, and the products of each precision."""

import pytest
import torch

from lvm.codec.runner import (
    Matrix,
    Precision,
    StackRunner,
    best_precision,
    first_largest,
    require_precision,
)
from lvm.codec.t5 import T5Config, T5Stack
from lvm.errors import InputError

# Loss of one product or stack on unit-scale numbers: rounding to 8 bits of significance, or to 1/127 of the largest.
TOLERANCE: dict[Precision, float] = {"float32": 1e-5, "bfloat16": 0.05, "int8": 0.05}


def make_stack(is_decoder: bool) -> T5Stack:
    torch.manual_seed(4)
    return T5Stack(T5Config(32, 8, 4, 64, 3, is_decoder)).eval()


@pytest.mark.parametrize("precision", list(TOLERANCE))
def test_a_product_is_that_of_the_weight(precision: Precision) -> None:
    torch.manual_seed(1)
    weight, x = torch.randn(40, 64) / 8, torch.randn(5, 7, 64)
    expected = x @ weight.T
    got = Matrix(weight, precision)(x)
    assert got.dtype == torch.float32
    assert (got - expected).norm() / expected.norm() < TOLERANCE[precision]
    flat = x.reshape(-1, 64)
    matrix = Matrix(weight, precision)
    assert torch.equal(matrix.largest(flat), matrix(flat).argmax(-1))


def test_int8_products_of_a_row_do_not_depend_on_its_batch() -> None:
    """A scale per row: an outlier in one row costs the others nothing."""
    torch.manual_seed(2)
    x = torch.randn(700, 48)
    matrix = Matrix(torch.randn(30, 48), "int8")
    alone = matrix(x[5:6])
    x[6] *= 1e4
    assert torch.equal(matrix(x)[5:6], alone)


@pytest.mark.parametrize("width", [7, 128, 1024])
def test_the_first_of_the_largest_is_found(width: int) -> None:
    values = torch.randint(0, 40, (50, width), generator=torch.Generator().manual_seed(6)).float()
    expected = [row.index(max(row)) for row in values.tolist()]
    assert first_largest(values).tolist() == expected


def test_a_zero_row_or_weight_gives_zeros_and_no_nan() -> None:
    weight = torch.randn(6, 8)
    weight[2] = 0
    out = Matrix(weight, "int8")(torch.cat((torch.zeros(1, 8), torch.randn(1, 8))))
    assert torch.equal(out[0], torch.zeros(6))
    assert out[1, 2] == 0


@pytest.mark.parametrize("precision", list(TOLERANCE))
def test_an_encoder_gives_the_stacks_states(precision: Precision) -> None:
    stack = make_stack(False)
    x = torch.randn(3, 11, 32)
    mask = torch.arange(11)[None] < torch.tensor([11, 7, 3])[:, None]
    with torch.inference_mode():
        expected = stack(x, mask)[mask]
        got = StackRunner(stack, precision).encode(x, mask)[mask]
    assert (got - expected).norm() / expected.norm() < TOLERANCE[precision]


@pytest.mark.parametrize("memory_places", [5, 60])  # short and long memories are held in different types
@pytest.mark.parametrize("precision", list(TOLERANCE))
def test_a_decoder_step_by_step_gives_the_stacks_states(precision: Precision, memory_places: int) -> None:
    stack = make_stack(True)
    x, memory = torch.randn(4, 9, 32), torch.randn(4, memory_places, 32)
    runner = StackRunner(stack, precision)
    with torch.inference_mode():
        expected = stack(x, None, memory)
        cache = runner.begin(memory, None, 9)
        got = torch.stack([runner.step(cache, x[:, t]) for t in range(9)], dim=1)
    assert (got - expected).norm() / expected.norm() < TOLERANCE[precision]


def test_padded_memory_is_as_if_it_were_not_there() -> None:
    stack = make_stack(True)
    runner = StackRunner(stack, "float32")
    x, memory = torch.randn(2, 4, 32), torch.randn(2, 6, 32)
    mask = torch.arange(6)[None] < torch.tensor([6, 4])[:, None]
    with torch.inference_mode():
        padded = runner.begin(memory, mask, 4)
        short = runner.begin(memory[1:, :4], None, 4)
        for t in range(4):
            both, alone = runner.step(padded, x[:, t]), runner.step(short, x[1:, t])
            torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=1e-5)


def test_kept_rows_go_on_as_before() -> None:
    stack = make_stack(True)
    runner = StackRunner(stack, "float32")
    x, memory = torch.randn(5, 6, 32), torch.randn(5, 3, 32)
    rows = torch.tensor([1, 4])
    with torch.inference_mode():
        whole, cut = runner.begin(memory, None, 6), runner.begin(memory, None, 6)
        for t in range(6):
            expected = runner.step(whole, x[:, t])[rows]
            if t == 3:
                cut.keep(rows)
            got = runner.step(cut, x[rows, t] if t >= 3 else x[:, t])
            if t >= 3:
                torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_a_runner_leaves_the_stack_as_it_was() -> None:
    stack = make_stack(True)
    before = {name: t.clone() for name, t in stack.state_dict().items()}
    StackRunner(stack, "int8")
    assert all(torch.equal(t, before[name]) for name, t in stack.state_dict().items())


def test_an_unknown_precision_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match="unknown precision 'int4'; expected one of float32, bfloat16, int8"):
        require_precision("int4")
    assert best_precision(torch.device("cpu")) in TOLERANCE
