"""TMD codes."""

import numpy as np
import pytest

from lvm.corpus.tmd import (
    AXES,
    SIZES,
    Prototypes,
    Tmd,
    Wanted,
    distribution,
    distribution_table,
    labels,
    number_of,
    phrases,
    unpack,
)
from lvm.errors import InputError
from tests.tmd_labels import agreement, read_labels


def test_there_are_16_domains_32_tasks_and_64_modifiers() -> None:
    assert tuple(map(len, labels())) == SIZES
    assert labels()[0][0] == "Science"
    assert labels()[0][15] == "Software"
    assert len({label for _, label in phrases()}) == sum(SIZES)


def test_each_part_has_its_bits() -> None:
    assert Tmd(15, 0, 0).code == 0b1111_00000_000000_0
    assert Tmd(0, 31, 0).code == 0b0000_11111_000000_0
    assert Tmd(0, 0, 63).code == 0b0000_00000_111111_0
    assert Tmd(1, 2, 3).names == (labels()[0][1], labels()[1][2], labels()[2][3])


def test_packing_and_unpacking_are_inverse_for_all_codes() -> None:
    every = [Tmd(d, t, m) for d in range(16) for t in range(32) for m in range(64)]
    codes = [tmd.code for tmd in every]
    assert len(set(codes)) == 32_768
    assert [unpack(code) for code in codes] == every
    bits = np.stack([tmd.features() for tmd in every])
    assert bits.shape == (32_768, 16)
    assert bits.dtype == np.float32
    np.testing.assert_array_equal(bits @ (1 << np.arange(15, -1, -1)), codes)


@pytest.mark.parametrize("code", [-2, 1, 65535, 65536])
def test_what_is_no_code_is_refused(code: int) -> None:
    with pytest.raises(InputError, match="expected an even number"):
        unpack(code)


@pytest.mark.parametrize("parts", [(16, 0, 0), (0, 32, 0), (0, 0, 64), (-1, 0, 0)])
def test_a_part_out_of_range_is_refused(parts: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match="expected 0 to"):
        Tmd(*parts)


def test_a_label_is_found_by_its_name_in_any_case() -> None:
    assert number_of("domain", "software") == 15
    assert number_of("modifier", "Schema-Bound") == labels()[2].index("Schema-bound")
    with pytest.raises(InputError, match=r"no task 'Singing'; expected one of Fact Retrieval, "):
        number_of("task", "Singing")


def one_hot() -> np.ndarray:
    """Of each phrase the axis of its label, so that a prototype is its own axis."""
    return np.eye(sum(SIZES), dtype=np.float32)[[label for _, label in phrases()]]


def test_the_nearest_label_of_each_axis_wins_and_says_how_sure_it_is() -> None:
    axes = np.eye(sum(SIZES), dtype=np.float32)
    sure = axes[5] * 0.9 + axes[16 + 7] * 0.8 + axes[48 + 9] * 0.7
    none = np.zeros_like(sure)
    none[0] = 1e-9
    first, second = Prototypes(one_hot()).nearest(np.stack([sure, none]))
    assert first.tmd == Tmd(5, 7, 9)
    assert first.cosines == pytest.approx((0.9, 0.8, 0.7))
    assert min(first.confidences) > 0.99
    assert second.confidences == pytest.approx((1 / 16, 1 / 32, 1 / 64))
    assert second.confidence == pytest.approx(1 / 32)
    with pytest.raises(InputError, match="one for each of phrases"):
        Prototypes(one_hot()[:10])
    with pytest.raises(InputError, match="got vectors of shape"):
        Prototypes(one_hot()).nearest(axes[:2, :7])


def test_codes_alone_are_those_of_the_nearest_labels() -> None:
    vectors = np.random.default_rng(0).standard_normal((50, sum(SIZES))).astype(np.float32)
    prototypes = Prototypes(one_hot())
    found = prototypes.codes(vectors)
    one_by_one = prototypes.nearest(vectors)
    assert found.tolist() == [coded.tmd.code for coded in one_by_one]
    assert len(set(found.tolist())) > 40
    codes, confidences = prototypes.code(vectors)
    assert codes.tolist() == found.tolist()
    assert confidences.tolist() == pytest.approx([coded.confidence for coded in one_by_one])
    assert confidences.std() > 0.01


def test_what_is_wanted_of_a_code_is_compared_part_by_part() -> None:
    codes = np.array([Tmd(3, 4, 5).code, Tmd(3, 9, 5).code, Tmd(2, 4, 5).code])
    assert Wanted().matches(codes).all()
    assert not Wanted()
    assert Wanted.of("engineering").matches(codes).tolist() == [True, True, False]
    assert Wanted(3, 4, 5).matches(codes).tolist() == [True, False, False]
    assert Wanted(task=4).matches(codes).tolist() == [True, False, True]
    assert Wanted(0)
    with pytest.raises(InputError, match="no modifier 'x'"):
        Wanted.of(modifier="x")


def test_agreement_is_that_with_the_reader_and_kappa_takes_chance_out() -> None:
    a, b = Tmd(1, 1, 1), Tmd(2, 2, 2)
    assert agreement([a, b, a, b], [a, b, a, b])["domain"]["kappa"] == pytest.approx(1)
    half = agreement([a, a, a, a], [a, b, a, b])["task"]
    assert (half["agreement"], half["kappa"], half["most_frequent"]) == (0.5, 0, 0.5)
    assert half["any_label"] == 1 / 32


def test_mini_agrees_with_a_reader_on_domains_far_more_than_chance() -> None:
    from lvm.codec.zoo import load_codec

    codec = load_codec("mini")
    prototypes = Prototypes(codec.encode([phrase for phrase, _ in phrases()]))
    texts, wanted = read_labels()
    assert len(texts) == 100
    report = agreement([c.tmd for c in prototypes.nearest(codec.encode(texts))], wanted)
    assert report["domain"]["kappa"] > 0.3
    assert report["modifier"]["kappa"] > 0.1
    assert report["task"]["kappa"] > 0.03


def test_a_prototype_lies_between_its_phrases() -> None:
    vectors = one_hot()
    first, second = (i for i, (_, label) in enumerate(phrases()) if label == 0)
    vectors[second] = np.eye(sum(SIZES), dtype=np.float32)[111]
    prototype = Prototypes(vectors).vectors[0]
    assert prototype[0] == pytest.approx(prototype[111]) == pytest.approx(0.5**0.5)
    assert first != second


def test_one_code_for_everything_has_no_entropy_and_all_codes_the_most() -> None:
    same = distribution([Tmd(3, 4, 5).code] * 9)
    assert (same["texts"], same["different"], same["entropy"]) == (9, 1, 0)
    assert same["domain"]["counts"]["Engineering"] == 9
    every = distribution({code: 2 for code in range(0, 1 << 16, 2)})
    assert every["entropy"] == pytest.approx(15)
    assert [every[axis]["entropy"] for axis in AXES] == pytest.approx([4, 5, 6])
    table = distribution_table([Tmd(3, 4, 5).code] * 3 + [Tmd(2, 4, 5).code])
    assert "| domain | 0.81 | 4 | Engineering 75%, Technology 25% |" in table
    assert distribution([])["entropy"] == 0


def test_mini_puts_typical_texts_where_they_belong() -> None:
    from lvm.codec.zoo import load_codec

    codec = load_codec("mini")
    encoded = codec.encode_chunks([phrase for phrase, _ in phrases()])
    assert not encoded.truncated.any()
    prototypes = Prototypes(encoded.vectors)
    texts = {
        "The judge sentenced him to ten years in prison for the crime.": "Law",
        "The surgeon operated on the patient, whose heart had stopped.": "Medicine",
        "In the election the party won a majority of seats in parliament.": "Politics",
        "The equation has two solutions, both of them negative numbers.": "Mathematics",
        "The lake lies in a forest between two mountains.": "Environment",
    }
    found = prototypes.nearest(codec.encode_chunks(list(texts)).vectors)
    assert [coded.tmd.names[0] for coded in found] == list(texts.values())
