from dataclasses import replace

import pytest

from lvm.codec.identity import CodecIdentity, require_same_codec
from lvm.errors import IdentityError, InputError

IDENTITY = CodecIdentity("mini", "a" * 64, "b" * 64, "mean", False, True, 32, 768)


def test_the_name_takes_no_part_in_the_digest() -> None:
    assert replace(IDENTITY, name="copy").digest == IDENTITY.digest


@pytest.mark.parametrize(
    "change",
    [
        {"encoder_sha256": "c" * 64},
        {"tokenizer_sha256": "c" * 64},
        {"pooling": "max"},
        {"dense": True},
        {"normalized": False},
        {"max_tokens": 64},
        {"dim": 512},
    ],
    ids=lambda c: next(iter(c)),
)
def test_every_other_field_does_and_the_refusal_names_both(change: dict) -> None:
    other = replace(IDENTITY, name="other", **change)
    with pytest.raises(IdentityError) as caught:
        require_same_codec(IDENTITY, other, "the index", "the checkpoint")
    message = str(caught.value)
    assert str(IDENTITY) in message
    assert str(other) in message
    assert next(iter(change)) in message


def test_same_codec_is_no_error() -> None:
    require_same_codec(IDENTITY, replace(IDENTITY, name="copy"), "a", "b")


def test_round_trip_through_a_record() -> None:
    assert CodecIdentity.from_dict(IDENTITY.to_dict()) == IDENTITY


def test_an_edited_record_is_refused() -> None:
    with pytest.raises(InputError, match="edited or damaged"):
        CodecIdentity.from_dict({**IDENTITY.to_dict(), "pooling": "max"})


def test_a_record_without_a_field_is_refused() -> None:
    record = IDENTITY.to_dict()
    del record["max_tokens"]
    with pytest.raises(InputError, match="lacks max_tokens"):
        CodecIdentity.from_dict(record)
