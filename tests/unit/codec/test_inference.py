"""Encoders prepared for a backfill against the networks they were made from."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lvm.codec.encoder import MAX_PADDING, MIN_COSINE, GtrEncoder
from lvm.codec.inference import Int8Encoder, Int8MiniEncoder, Product, digits, positive_digits
from lvm.codec.mini import MiniConfig, MiniEncoder
from lvm.codec.t5 import T5Config, T5Stack
from lvm.codec.zoo import load_codec

pytestmark = pytest.mark.skipif(
    not torch.cpu.get_capabilities().get("avx512_vnni"), reason="needs a CPU with VNNI instructions"
)
TEXTS = ["Yes.", "The river rises in the hills.", "In 1871 it opened a second factory for engines."]


def padded(rows: list[int], vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, vocabulary, (len(rows), max(rows)), generator=torch.Generator().manual_seed(3))
    return ids, torch.arange(max(rows))[None] < torch.tensor(rows)[:, None]


@pytest.mark.parametrize("positive", [False, True])
def test_a_product_of_digits_is_that_of_the_numbers(positive: bool) -> None:
    torch.manual_seed(1)
    weight, x = torch.randn(40, 64) / 8, torch.randn(300, 64) * torch.logspace(-3, 3, 300)[:, None]
    x = x.abs() if positive else x
    rows, largest = (positive_digits if positive else digits)(x.clone())
    got = Product(weight, positive)(rows) * largest
    assert F.cosine_similarity(got, x @ weight.T).min() > 0.999


@pytest.mark.parametrize("lengths", [[7, 7, 7], [9, 4, 1]])
def test_prepared_encoders_give_the_networks_vectors(lengths: list[int]) -> None:
    torch.manual_seed(2)
    mini = MiniEncoder(MiniConfig(64, 12, 32, 64, d_ff=96, num_heads=4)).eval()
    stack = T5Stack(T5Config(64, 16, 4, 128, 3, False)).eval()
    gtr = GtrEncoder(torch.randn(64, 64), stack, None, False)
    ids, mask = padded(lengths, 64)
    real = None if bool(mask.all()) else mask
    with torch.inference_mode():
        for exact, rough in (
            (mini(ids, mask), Int8MiniEncoder(mini)(ids, real)),
            (gtr(ids, mask), gtr.prepared("int8")(ids, real)),
        ):
            assert F.cosine_similarity(exact, rough).min() > MIN_COSINE
        x = torch.randn(3, 5, 64)
        torch.testing.assert_close(Int8Encoder(stack).encode(x), stack(x), atol=0.1, rtol=0.1)


def test_a_text_alone_has_the_vector_it_has_in_any_batch() -> None:
    codec = load_codec("mini")
    together = codec.encode_chunks(TEXTS * 20).vectors
    alone = np.concatenate([codec.encode_chunks([t]).vectors for t in TEXTS])
    assert np.einsum("nd,nd->n", together[:3], alone).min() > 0.999999


def test_batches_hold_every_row_once_and_little_padding() -> None:
    encoder = load_codec("mini")._encoder
    ids = [[3] * (2 + i % 30) for i in range(500)]
    seen = []
    for rows, batch, mask in encoder.batches(ids):
        seen += rows.tolist()
        assert batch.numel() <= encoder.batch_tokens
        padding = 0 if mask is None else int((~mask).sum())
        assert padding <= MAX_PADDING
        assert padding == batch.numel() - sum(len(ids[r]) for r in rows)
    assert sorted(seen) == list(range(500))


def test_weights_that_do_not_bear_int8_stay_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = load_codec("mini")._encoder
    assert encoder.precision == "int8"
    monkeypatch.setattr("lvm.codec.encoder.MIN_COSINE", 1.001)  # which no weights keep
    encoder.use_if_close("int8")
    assert encoder.precision == "float32"
