"""Our T5 blocks against transformers' own, on the same weights."""

import pytest
import torch
from transformers import T5Config as ReferenceConfig
from transformers.models.t5.modeling_t5 import T5Stack as ReferenceStack

from lvm.codec.t5 import T5Config, T5Stack, relative_buckets
from lvm.errors import InputError


def stacks(is_decoder: bool) -> tuple[T5Stack, ReferenceStack]:
    torch.manual_seed(0)
    ours = T5Stack(T5Config(32, 8, 4, 64, 3, is_decoder)).eval()
    reference = ReferenceStack(
        ReferenceConfig(
            vocab_size=50,
            d_model=32,
            d_kv=8,
            num_heads=4,
            d_ff=64,
            num_layers=3,
            is_decoder=is_decoder,
            use_cache=False,
            is_encoder_decoder=False,
            dropout_rate=0.0,
        )
    ).eval()
    missing, unexpected = reference.load_state_dict(ours.state_dict(), strict=False)
    assert not unexpected
    assert set(missing) <= {"embed_tokens.weight"}
    return ours, reference


def test_encoder_equals_transformers_with_padding() -> None:
    ours, reference = stacks(is_decoder=False)
    x = torch.randn(3, 11, 32)
    mask = torch.arange(11)[None] < torch.tensor([11, 7, 3])[:, None]
    with torch.inference_mode():
        got = ours(x, mask)
        expected = reference(inputs_embeds=x, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(got[mask], expected[mask], atol=1e-5, rtol=1e-5)


def test_decoder_equals_transformers_with_memory() -> None:
    ours, reference = stacks(is_decoder=True)
    x, memory = torch.randn(2, 40, 32), torch.randn(2, 4, 32)
    with torch.inference_mode():
        got = ours(x, None, memory)
        expected = reference(inputs_embeds=x, encoder_hidden_states=memory).last_hidden_state
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_equal_transformers(bidirectional: bool) -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(200)[None] - torch.arange(200)[:, None]
    expected = T5Attention._relative_position_bucket(distance, bidirectional, 32, 128)
    assert torch.equal(relative_buckets(200, 200, bidirectional, 32, 128), expected)


def test_zero_layers_are_refused_by_name() -> None:
    with pytest.raises(InputError, match="num_layers must be at least 1"):
        T5Config(32, 8, 4, 64, 0, True)
