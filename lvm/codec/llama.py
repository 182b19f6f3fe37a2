"""A Llama decoder in plain torch: a full forward pass for training an adapter, and single steps for batched generation.

Why our own: general-purpose classes do not keep caches in fixed buffers, multiply in int8 on a CPU, or remove finished
rows from the batch. A test checks equality with transformers. Weights come from a folder in the hub's layout or a GGUF
file.

Sources: Touvron et al. 2023 (arXiv:2302.13971); grouped-query attention, Ainslie et al. 2023 (arXiv:2305.13245); rotary
positions, Su et al. 2021 (arXiv:2104.09864); low-rank adapters, Hu et al. 2021 (arXiv:2106.09685).

Letters: B rows, S positions, W width, H query heads, G key-value heads, K width of a head, V vocabulary, V' ids that
may be generated.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn

from lvm.codec.runner import Matrix, Precision
from lvm.errors import InputError

ADAPTED = ("q_proj", "v_proj", "o_proj", "down_proj")
"""The projections of each block that an adapter updates."""


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of the network, named as in transformers' LlamaConfig."""

    hidden_size: int
    """Width of a hidden state, W."""
    num_hidden_layers: int
    """Blocks."""
    num_attention_heads: int
    """Query heads, H."""
    num_key_value_heads: int
    """Key and value heads, G; each serves H / G query heads."""
    intermediate_size: int
    """Width inside the feed-forward layers."""
    vocab_size: int
    """Token ids, V."""
    rope_theta: float
    """Base of the rotary angles."""
    rms_norm_eps: float
    """Added to the mean square in the norms."""

    @property
    def head_width(self) -> int:
        """Width of a head, K."""
        return self.hidden_size // self.num_attention_heads


TOY = LlamaConfig(64, 2, 4, 2, 96, 512, 10_000.0, 1e-5)
"""Sizes for tests."""


class Llama:
    """The weights of a network, named as in transformers, and its tokenizer."""

    def __init__(self, config: LlamaConfig, weights: dict[str, Tensor], tokenizer: Tokenizer) -> None:
        """weights: `embed_tokens`, `norm` and `layers.N.…`, without prefix; input and output embeddings are tied."""
        self.config, self.weights, self.tokenizer = config, weights, tokenizer


def shapes(c: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every weight, by name."""
    W, inner, kv = c.hidden_size, c.intermediate_size, c.num_key_value_heads * c.head_width
    block: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (W, W),
        "self_attn.k_proj": (kv, W),
        "self_attn.v_proj": (kv, W),
        "self_attn.o_proj": (W, W),
        "mlp.gate_proj": (inner, W),
        "mlp.up_proj": (inner, W),
        "mlp.down_proj": (W, inner),
        "input_layernorm": (W,),
        "post_attention_layernorm": (W,),
    }
    blocks = range(c.num_hidden_layers)
    out: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (c.vocab_size, W), "norm.weight": (W,)}
    return out | {f"layers.{i}.{name}.weight": shape for i in blocks for name, shape in block.items()}


def load_hub_folder(folder: Path) -> Llama:
    """Load config.json, tokenizer.json and model.safetensors. Raises InputError if they are not a Llama with tied
    embeddings."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        record = json.loads((folder / "config.json").read_text())
        if record.get("model_type") != "llama" or not record.get("tie_word_embeddings", False):
            raise InputError(
                f"{folder} is a {record.get('model_type')} model, expected a Llama with tied embeddings"
            )
        theta = record.get("rope_theta") or record.get("rope_parameters", {}).get("rope_theta", 10_000.0)
        names = [n for n in LlamaConfig.__dataclass_fields__ if n != "rope_theta"]
        config = LlamaConfig(**{n: record[n] for n in names}, rope_theta=float(theta))
        loaded = load_file(folder / "model.safetensors")
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as err:
        raise InputError(f"cannot read a language model from {folder}: {err!r}") from err
    except Exception as err:  # the tokenizers library raises bare Exception on bad JSON
        raise InputError(f"{folder / 'tokenizer.json'} is not a tokenizer: {err}") from err
    weights = {k.removeprefix("model."): v for k, v in loaded.items()}
    return Llama(config, _checked(config, weights, folder), tokenizer)


def load_gguf(path: Path) -> Llama:
    """Load a GGUF file of the llama architecture; quantised weights become bfloat16.

    Raises InputError if it is damaged or of another architecture.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        kind = reader.fields["general.architecture"].contents()
        if kind != "llama":
            raise InputError(f"{path} is of architecture {kind}, expected llama")
        get = {k: f.contents for k, f in reader.fields.items()}
        config = LlamaConfig(
            hidden_size=get["llama.embedding_length"](),
            num_hidden_layers=get["llama.block_count"](),
            num_attention_heads=get["llama.attention.head_count"](),
            num_key_value_heads=get["llama.attention.head_count_kv"](),
            intermediate_size=get["llama.feed_forward_length"](),
            vocab_size=len(get["tokenizer.ggml.tokens"]()),
            rope_theta=float(get["llama.rope.freq_base"]()),
            rms_norm_eps=float(get["llama.attention.layer_norm_rms_epsilon"]()),
        )
        weights: dict[str, Tensor] = {}
        for tensor in reader.tensors:
            name = _GGUF_NAMES.get(tensor.name) or _block_name(tensor.name)
            if name is None:
                continue
            values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
            if "q_proj" in name or "k_proj" in name:
                heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
                # GGUF stores the two rows of each rotary pair together, transformers in separate halves of the head.
                by_pairs = values.view(heads, config.head_width // 2, 2, -1)
                values = by_pairs.transpose(1, 2).reshape(values.shape)
            weights[name] = values.float() if values.ndim == 1 else values.bfloat16()
        tokens: list[str] = get["tokenizer.ggml.tokens"]()
        merges = [tuple(m.split(" ")) for m in get["tokenizer.ggml.merges"]()]
        kinds: list[int] = get["tokenizer.ggml.token_type"]()
        if get["tokenizer.ggml.pre"]() != "smollm":
            raise InputError(f"{path} has a tokenizer of kind {get['tokenizer.ggml.pre']()}, expected smollm")
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, IndexError) as err:
        raise InputError(f"cannot read {path} as a GGUF file ({err!r}); download it again") from err
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    # As in SmolLM2's tokenizer.json: single digits, then GPT-2's bytes.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # a GGUF token type
    tokenizer.add_special_tokens([t for t, k in zip(tokens, kinds, strict=True) if k == control])
    return Llama(config, _checked(config, weights, path), tokenizer)


_GGUF_NAMES = {"token_embd.weight": "embed_tokens.weight", "output_norm.weight": "norm.weight"}
_GGUF_BLOCK = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def _block_name(name: str) -> str | None:
    parts = name.split(".")
    if len(parts) != 4 or parts[0] != "blk" or parts[2] not in _GGUF_BLOCK:
        return None
    return f"layers.{parts[1]}.{_GGUF_BLOCK[parts[2]]}.weight"


def _checked(config: LlamaConfig, weights: Mapping[str, Tensor], where: Path) -> dict[str, Tensor]:
    wanted = shapes(config)
    wrong = [n for n, s in wanted.items() if n not in weights or tuple(weights[n].shape) != s]
    if wrong:
        raise InputError(
            f"{where}: {len(wrong)} weights are missing or have the wrong shape, {wrong[0]} first; download it again"
        )
    return {n: weights[n] for n in wanted}


class Adapter(nn.Module):
    """Low-rank updates of a network's projections: W x + B (A x)."""

    def __init__(self, config: LlamaConfig, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.down = nn.ParameterDict()
        self.up = nn.ParameterDict()
        for name, shape in shapes(config).items():
            if name.split(".")[-2] in ADAPTED:
                key = name.replace(".", "/")
                self.down[key] = nn.Parameter(torch.randn(rank, shape[1]) * shape[1] ** -0.5)
                self.up[key] = nn.Parameter(torch.zeros(shape[0], rank))

    @torch.no_grad()
    def merged(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights with the adapter's updates added; weights without an update are shared."""
        out = dict(weights)
        for key in self.down:
            name = key.replace("/", ".")
            update = self.up[key].float() @ self.down[key].float()
            out[name] = weights[name].float() + update.to(weights[name].device)
        return out


def rotary(config: LlamaConfig, places: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles of the first `places` positions, (places, K) float32 each."""
    half = torch.arange(0, config.head_width, 2, device=device, dtype=torch.float32) / config.head_width
    angles = torch.arange(places, device=device, dtype=torch.float32)[:, None] / config.rope_theta**half
    doubled = torch.cat((angles, angles), dim=-1)
    return doubled.cos(), doubled.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (…, K) rotated; cos and sin, from `rotary`, broadcast to its shape."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def forward(model: Llama, adapter: Adapter | None, x: Tensor) -> Tensor:
    """States (B, S, W) after the last norm, from inputs x (B, S, W) in the dtype of the weights.

    Attention is causal, so padding at the end needs no mask. Gradients reach the inputs and the adapter only.
    """
    c, w = model.config, model.weights
    B, S, _ = x.shape
    H, G, K = c.num_attention_heads, c.num_key_value_heads, c.head_width
    cos, sin = (t.to(x.dtype) for t in rotary(c, S, x.device))

    def product(name: str, given: Tensor) -> Tensor:
        out = F.linear(given, w[name])
        if adapter is not None and (key := name.replace(".", "/")) in adapter.down:
            down, up = adapter.down[key].to(given.dtype), adapter.up[key].to(given.dtype)
            out = out + F.linear(F.linear(given, down), up)
        return out

    def norm(name: str, given: Tensor) -> Tensor:
        return F.rms_norm(given, (c.hidden_size,), w[name].to(given.dtype), c.rms_norm_eps)

    for i in range(c.num_hidden_layers):
        at = f"layers.{i}."
        h = norm(at + "input_layernorm.weight", x)
        q = product(at + "self_attn.q_proj.weight", h).view(B, S, H, K).transpose(1, 2)
        k = product(at + "self_attn.k_proj.weight", h).view(B, S, G, K).transpose(1, 2)
        v = product(at + "self_attn.v_proj.weight", h).view(B, S, G, K).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(
            rotate(q, cos, sin),
            rotate(k, cos, sin).repeat_interleave(H // G, 1),
            v.repeat_interleave(H // G, 1),
            is_causal=True,
        )
        x = x + product(at + "self_attn.o_proj.weight", mixed.transpose(1, 2).reshape(B, S, -1))
        h = norm(at + "post_attention_layernorm.weight", x)
        inner = F.silu(product(at + "mlp.gate_proj.weight", h)) * product(at + "mlp.up_proj.weight", h)
        x = x + product(at + "mlp.down_proj.weight", inner)
    return norm("norm.weight", x)


class _Layer:
    def __init__(self, weights: dict[str, Tensor], number: int, precision: Precision) -> None:
        def get(name: str) -> Tensor:
            return weights[f"layers.{number}.{name}.weight"].float()

        self.first_norm, self.second_norm = get("input_layernorm"), get("post_attention_layernorm")
        self.qkv = Matrix(torch.cat([get(f"self_attn.{name}_proj") for name in "qkv"]), precision)
        self.out = Matrix(get("self_attn.o_proj"), precision)
        self.inner = Matrix(torch.cat([get("mlp.gate_proj"), get("mlp.up_proj")]), precision)
        self.outer = Matrix(get("mlp.down_proj"), precision)


class LlamaRunner:
    """A network for generation: weights fused, in a chosen precision; residual stream in float32."""

    def __init__(
        self,
        model: Llama,
        precision: Precision,
        adapter: Adapter | None = None,
        kept: Tensor | None = None,
        device: torch.device | None = None,
    ) -> None:
        """kept: (V',) int64, the token ids that may be generated; None for all."""
        self.config, self.device = model.config, device or torch.device("cpu")
        weights = model.weights if adapter is None else adapter.merged(model.weights)
        weights = {k: v.to(self.device) for k, v in weights.items()}
        self.layers = [_Layer(weights, i, precision) for i in range(self.config.num_hidden_layers)]
        self.final_norm = weights["norm.weight"].float()
        self.table = weights["embed_tokens.weight"]
        """(V, W) input embeddings."""
        output = self.table if kept is None else self.table[kept.to(self.device)]
        self.head = Matrix(output.float(), precision)
        """States (…, W) to logits (…, V')."""
        self._rotary = rotary(self.config, 256, self.device)

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (…) int64 to (…, W) float32."""
        return F.embedding(ids, self.table).float()

    def begin(self, x: Tensor, places: int) -> "LlamaCache":
        """Prefill: a cache filled with inputs x (B, S, W) float32, with their states and room for `places`
        positions."""
        c = self.config
        B, S, _ = x.shape
        H, G, K = c.num_attention_heads, c.num_key_value_heads, c.head_width
        cos, sin = (t[:S, None] for t in self._rotary_for(places))
        # Zeros, not empty: unfilled positions are masked, but a NaN there would propagate.
        keys = x.new_zeros(c.num_hidden_layers, 2, B, G, places, K)
        for i, layer in enumerate(self.layers):
            qkv = layer.qkv(self._norm(x, layer.first_norm)).view(B, S, H + 2 * G, K)
            rotated = rotate(qkv[:, :, : H + G], cos, sin).transpose(1, 2)
            k, v = rotated[:, H:], qkv[:, :, H + G :].transpose(1, 2)
            keys[i, 0, :, :, :S], keys[i, 1, :, :, :S] = k, v
            mixed = F.scaled_dot_product_attention(
                rotated[:, :H], k.repeat_interleave(H // G, 1), v.repeat_interleave(H // G, 1), is_causal=True
            )
            x = x + layer.out(mixed.transpose(1, 2).reshape(B, S, -1))
            x = x + self._feed_forward(layer, x)
        filled = torch.full((B,), S, device=x.device)
        return LlamaCache(keys, filled, self._norm(x, self.final_norm))

    def step(self, cache: "LlamaCache", x: Tensor) -> Tensor:
        """The state (B, W) float32 at each row's next position, from its input (B, W) there."""
        c = self.config
        B, places = len(x), cache.places
        H, G, K = c.num_attention_heads, c.num_key_value_heads, c.head_width
        longest = int(places.max()) + 1
        cos, sin = (t[places, None] for t in self._rotary_for(longest))
        row = torch.arange(B, device=x.device)
        unfilled = None
        if int(places.min()) + 1 < longest:  # rows that joined later have fewer positions filled
            unfilled = (torch.arange(longest, device=x.device) > places[:, None])[:, None, None]
        for i, layer in enumerate(self.layers):
            qkv = layer.qkv(self._norm(x, layer.first_norm)).view(B, H + 2 * G, K)
            rotated = rotate(qkv[:, : H + G], cos, sin)
            keys, values = cache.own[i, 0], cache.own[i, 1]
            keys[row, :, places], values[row, :, places] = rotated[:, H:], qkv[:, H + G :]
            # The H / G query heads that share keys are rows of one product.
            q = rotated[:, :H].view(B, G, H // G, K) * K**-0.5
            scores = torch.matmul(q, keys[:, :, :longest].transpose(2, 3))
            if unfilled is not None:
                scores = scores.masked_fill_(unfilled, float("-inf"))
            mixed = torch.matmul(scores.softmax(-1), values[:, :, :longest])
            x = x + layer.out(mixed.reshape(B, -1))
            x = x + self._feed_forward(layer, x)
        cache.places = places + 1
        return self._norm(x, self.final_norm)

    def _feed_forward(self, layer: _Layer, x: Tensor) -> Tensor:
        gate, up = layer.inner(self._norm(x, layer.second_norm)).chunk(2, dim=-1)
        return layer.outer(F.silu(gate).mul_(up))

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.config.rms_norm_eps)

    def _rotary_for(self, places: int) -> tuple[Tensor, Tensor]:
        if places > len(self._rotary[0]):
            self._rotary = rotary(self.config, 2 * places, self.device)
        return self._rotary


@dataclass
class LlamaCache:
    """Keys and values of B rows being generated."""

    own: Tensor
    """(layers, 2, B, G, places, K) float32."""
    places: Tensor
    """(B,) int64, number of positions filled in each row."""
    states: Tensor
    """(B, S, W) states of the prefill."""

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows, (B',) int64, in this order; a row may be repeated."""
        filled = int(self.places.max())
        own = self.own.new_zeros((*self.own.shape[:2], len(rows), *self.own.shape[3:]))
        own[:, :, :, :, :filled] = self.own[:, :, rows, :, :filled]
        self.own, self.places = own, self.places[rows]

    def join(self, other: "LlamaCache") -> None:
        """Append the rows of another cache with room for as many positions."""
        self.own = torch.cat((self.own, other.own), dim=2)
        self.places = torch.cat((self.places, other.places))
