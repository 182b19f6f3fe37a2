"""The same models called the way the original did: one request at a time, float32, nothing shared between requests.

What `serve_latency` compares the service with. Of the `mini` codec, the first texts come from transformers' own T5
stack, cache and `generate`; of GTR-layout weights, everything from vec2text's own classes, as its `invert_embeddings`
calls them.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lvm.codec.inverter import FORESEEN_SHARE
from lvm.codec.ladder import Ladder, LadderSettings, faults
from lvm.codec.vec2text_package import embed, load_vec2text, vec2text_ids
from lvm.codec.zoo import codec_folder, load_codec
from lvm.predict.predictor import load_predictor
from lvm.predict.steer import snap
from lvm.vectors.array import open_vectors
from lvm.vectors.index import load_index


@dataclass
class Comparison:
    """One side of the bench."""

    answer: Callable[[list[str]], tuple[np.ndarray, str]]
    """Five texts to the steered vector (D,) and the source of the answer."""
    same: Callable[[np.ndarray], bool] | None = None
    """Whether a vector's first text has the token ids that our own engine writes in float32."""


def mini_comparison(run: Path, model: str) -> Comparison:
    """The shipped codec: the ladder over the same engine, but every first text by transformers, one at a time."""
    codec = load_codec("mini", precision="float32")
    ours = load_codec("mini", precision="float32").inverter
    array, index = open_vectors(run / "vectors"), load_index(run / "index")
    predict = load_predictor(model, run / "models")
    write = transformers_decoder("mini", ours.hypothesizer.foresee)
    codec.inverter.hypothesize = lambda vectors: [write(v) for v in vectors]  # type: ignore[method-assign]

    ladder = Ladder(codec, codec.writer, LadderSettings(cache_bytes=0))

    def answer(texts: list[str]) -> tuple[np.ndarray, str]:
        vectors = codec.encode_chunks(texts).vectors[None]
        raw = predict(vectors)
        steered = snap(raw, vectors[:, -1], vectors.mean(1), index, array.vectors).vectors
        return steered[0], ladder.decode(steered, vectors)[0].source

    def same(vector: np.ndarray) -> bool:
        return [int(i) for i in ours.hypothesize(vector[None])[0]] == write(vector)

    return Comparison(answer, same)


def vec2text_comparison(run: Path, model: str, root: Path, steps: int) -> Comparison:
    """GTR-layout weights under `root`: vec2text embeds and inverts, with `steps` corrector steps and no ladder.

    As `vec2text.invert_embeddings`, but that it writes at most the 32 tokens of these models, as ours does, where that
    function has 128 written.
    """
    import torch

    corrector = load_vec2text(root)
    codec = load_codec("gtr-jxe", root, precision="float32")  # for its scale and identity
    ours = codec.inverter
    array, index = open_vectors(run / "vectors"), load_index(run / "index")
    predict = load_predictor(model, run / "models")

    def write(vector: np.ndarray, steps: int) -> list[int]:
        return vec2text_ids(corrector, torch.from_numpy(vector[None] * np.float32(codec.scale)), steps)[0]

    def answer(texts: list[str]) -> tuple[np.ndarray, str]:
        own = np.concatenate([embed(corrector, [t]).numpy() for t in texts])
        vectors = (own / np.linalg.norm(own, axis=1, keepdims=True))[None]
        raw = predict(vectors)
        steered = snap(raw, vectors[:, -1], vectors.mean(1), index, array.vectors).vectors
        text = codec.tokenizer.decode([write(steered[0], steps)])[0]
        if not faults(text, LadderSettings()):
            return steered[0], "exact"
        array.texts(index.search(steered, 1)[1][0])
        return steered[0], "corpus"

    def same(vector: np.ndarray) -> bool:
        first = ours.hypothesize(vector[None] * np.float32(codec.scale))[0]
        return [int(i) for i in first] == write(vector, 0)

    return Comparison(answer, same)


def one_at_a_time(side: Comparison, contexts: Sequence[list[str]], seconds: float) -> dict[str, Any]:
    """Requests per second over at least `seconds`, and whether it writes our texts."""
    import torch

    torch.set_num_threads(2)
    for texts in contexts[:3]:
        side.answer(texts)
    same = total = done = 0
    taken: list[float] = []
    sources: Counter[str] = Counter()
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds:
        since = time.perf_counter()
        vector, source = side.answer(contexts[done % len(contexts)])
        taken.append(time.perf_counter() - since)
        done += 1
        sources[source] += 1
        if (
            side.same and total < 20
        ):  # it must be the same work: the same texts, but for rounding at a near tie
            same += side.same(vector)
            total += 1
            begun += time.perf_counter() - since - taken[-1]
    return {
        "requests_per_s": done / (time.perf_counter() - begun),
        "median_ms": 1000 * float(np.median(taken)),
        "same_texts": f"{same}/{total}",
        "sources": dict(sources),
    }


def transformers_decoder(codec_name: str, foresee: Any) -> Callable[[np.ndarray], list[int]]:
    """One (D,) vector to token ids through `generate` of transformers, float32, with its key-value cache.

    foresee: of `MiniHypothesizing`, what the places after each probably hold.

    The mini hypothesizer's T5 stack is transformers' own, loaded with the same tensors; around it stand the
    vector's priors, computed as in training (`lvm/codec/mini.py`).
    """
    import torch
    from safetensors.torch import load_file
    from transformers import (
        DynamicCache,
        EncoderDecoderCache,
        GenerationConfig,
        GenerationMixin,
        PretrainedConfig,
        PreTrainedModel,
        T5Config,
    )
    from transformers.modeling_outputs import CausalLMOutputWithPast
    from transformers.models.t5.modeling_t5 import T5Stack

    from lvm.codec.mini import MiniConfig, MiniEncoder, MiniHypothesizer, paired, unpaired

    folder = codec_folder(codec_name)
    config = MiniConfig(**json.loads((folder / "config.json").read_text())["config"])
    encoder = MiniEncoder(config)
    encoder.load_state_dict(load_file(folder / "encoder.safetensors"))
    ours = MiniHypothesizer(config, encoder.topic_norm)
    ours.load_state_dict(load_file(folder / "hypothesizer.safetensors"))
    encoder, ours = encoder.eval(), ours.eval()
    L = config.lexical_dim
    stack_config = T5Config(
        vocab_size=config.vocabulary_size,
        d_model=L,
        d_kv=L // config.num_heads,
        num_heads=config.num_heads,
        d_ff=config.d_ff,
        num_layers=config.decoder_layers,
        is_decoder=True,
        use_cache=True,
        dropout_rate=0.0,
    )
    stack = T5Stack(stack_config)
    missing = stack.load_state_dict(ours.decoder.state_dict(), strict=False)
    assert not missing.unexpected_keys, missing
    assert all("embed_tokens" in k for k in missing.missing_keys), missing
    end_id = load_codec(codec_name).tokenizer.end_id

    class Generating(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
        config_class = PretrainedConfig
        main_input_name = "input_ids"
        _supports_cache_class = True

        def __init__(self) -> None:
            super().__init__(
                PretrainedConfig(vocab_size=config.vocabulary_size, num_hidden_layers=config.decoder_layers)
            )
            self.stack = stack.eval()
            self.vectors = torch.zeros(1, config.dim)
            self.cache: Any = None
            self.after = torch.zeros(1, config.max_tokens, L)

        def prepare_inputs_for_generation(
            self, input_ids: Any, attention_mask: Any = None, past_key_values: Any = None, **_: Any
        ) -> dict[str, Any]:
            return {"input_ids": input_ids, "past_key_values": past_key_values}

        def forward(
            self, input_ids: Any, attention_mask: Any = None, past_key_values: Any = None, **_: Any
        ) -> Any:
            written = input_ids[:, 1:]  # the first place stands for "nothing written yet"
            t = written.shape[1]
            lexical = ours.unscale(self.vectors)[:, None]
            residual = lexical
            if t:
                embedded = encoder.tokens(written)
                residual = (
                    lexical
                    - encoder.bound(embedded, torch.ones_like(written, dtype=torch.bool)).sum(1)[:, None]
                )
                previous = embedded[:, -1:]
            else:
                previous = torch.zeros(1, 1, L)
                # T5's own kind of cache; `generate` would make the kind of a model without cross-attention.
                self.cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
                self.after = FORESEEN_SHARE * unpaired(foresee(paired(lexical[:, 0])))
            priors, _ = ours.priors(lexical, residual - self.after[:, t : t + 1], t)
            _, glimpse = ours.priors(lexical, residual, t)
            out = self.stack(
                inputs_embeds=ours.hidden(previous, glimpse),
                encoder_hidden_states=ours.remember(self.vectors),
                past_key_values=self.cache,
                use_cache=True,
            )
            state = ours.head(out.last_hidden_state, priors)
            logits = state @ encoder.tokens.weight.T + ours.bias
            return CausalLMOutputWithPast(logits=logits)

    model = Generating()
    settings = GenerationConfig(
        max_new_tokens=config.max_tokens,
        do_sample=False,
        eos_token_id=end_id,
        pad_token_id=0,
        use_cache=False,
    )

    @torch.inference_mode()
    def decode(vector: np.ndarray) -> list[int]:
        model.vectors = torch.from_numpy(vector)[None]
        first = torch.zeros(1, 1, dtype=torch.int64)
        out = model.generate(first, attention_mask=torch.ones_like(first), generation_config=settings)
        return [int(i) for i in out[0, 1:]]

    return decode
