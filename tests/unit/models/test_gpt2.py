"""Layers taken over from a checkpoint compute what transformers' own GPT-2 computes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2Config as TheirConfig
from transformers import GPT2Model

from lvm.errors import InputError
from lvm.models.gpt2 import GPT2, GPT2Config, sizes_of


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, GPT2Model]:
    torch.manual_seed(0)
    theirs = GPT2Model(TheirConfig(vocab_size=11, n_positions=8, n_embd=32, n_layer=3, n_head=2)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    return tmp_path, theirs


def test_its_layers_give_what_transformers_gives(checkpoint: tuple[Path, GPT2Model]) -> None:
    folder, theirs = checkpoint
    sizes = sizes_of(folder)
    assert sizes == {"width": 32, "num_layers": 3, "head_dim": 16, "num_positions": 8}
    ours = GPT2(GPT2Config(**sizes)).eval()
    ours.load_layers(folder)
    vectors = torch.randn(2, 6, 768)
    expected = theirs(inputs_embeds=ours.input_proj(vectors)).last_hidden_state
    torch.testing.assert_close(ours.norm(ours.states(ours.embed(vectors))), expected, atol=1e-4, rtol=1e-4)


def test_the_solved_start_leaves_loaded_layers_as_they_are(checkpoint: tuple[Path, GPT2Model]) -> None:
    folder, theirs = checkpoint
    ours = GPT2(GPT2Config(**sizes_of(folder)))
    ours.load_layers(folder)
    before = {n: p.clone() for n, p in ours.branches.named_parameters()}
    ours.start_from(torch.linalg.qr(torch.randn(768, 768)).Q[:32])
    assert all(torch.equal(p, before[n]) for n, p in ours.branches.named_parameters())
    # A vector within the directions comes in as long as the embeddings were.
    length = theirs.wte.weight.norm(dim=1).mean().item()
    assert ours.input_proj.weight.norm(dim=1).mean().item() == pytest.approx(length, rel=1e-4)


def test_a_place_after_the_last_position_goes_on_with_it() -> None:
    torch.manual_seed(0)
    model = GPT2(GPT2Config(width=32, num_layers=1, head_dim=16, num_positions=4)).eval()
    vectors = torch.zeros(1, 6, 768)
    embedded = model.embed(vectors)
    assert torch.equal(embedded[0, 3], embedded[0, 5])
    assert not torch.equal(embedded[0, 2], embedded[0, 3])
    assert torch.equal(model.embed(vectors[:, :1], start=2)[0, 0], embedded[0, 2])


def test_a_checkpoint_of_other_sizes_is_refused(checkpoint: tuple[Path, GPT2Model]) -> None:
    folder, _ = checkpoint
    with pytest.raises(InputError, match=r"expected wpe.weight of shape \(8, 48\), got \(8, 32\)"):
        GPT2(GPT2Config(width=48, num_layers=3, head_dim=16, num_positions=8)).load_layers(folder)
    with pytest.raises(InputError, match=r"expected h\.3\.ln_1\.weight of shape \(32,\), got none"):
        GPT2(GPT2Config(width=32, num_layers=4, head_dim=16, num_positions=8)).load_layers(folder)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json cannot be read"):
        sizes_of(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"n_embd": 32}))
    with pytest.raises(InputError, match="n_head"):
        sizes_of(tmp_path)
    model = GPT2(GPT2Config(width=32, num_layers=1, head_dim=16, num_positions=8))
    with pytest.raises(InputError, match="layout, such as distilgpt2"):
        model.load_layers(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="expected wpe"):
        model.load_layers(tmp_path)
