"""The original vec2text package as a decode engine, for comparison: `--engine vec2text`, `load_codec(engine=…)`.

vec2text 0.0.13 (Morris et al. 2023, arXiv:2310.06816), used as in its API: always the requested number of steps, no
early stop, and the last text even if an earlier one was nearer. It decodes `gtr-jxe`, the encoder its API uses.

The package was written for transformers 4 and needs a network. The workarounds here for transformers 5 and offline use
change no token: models are constructed and then filled with weights, as its nested from_pretrained fails, and metrics
that its trainers download only for training are left out.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lvm.codec.gtr import GTR_CODECS, MAX_TOKENS, repository_folders
from lvm.codec.inverter import Inversion
from lvm.codec.vec2text import END_ID, PAD_ID, read_config, read_weights
from lvm.errors import InputError

CODEC = "gtr-jxe"
"""The codec with vec2text's own encoder."""

T5 = "t5-base"
"""Name under which vec2text loads its architecture and tokenizer."""


@contextlib.contextmanager
def _names_under(root: Path | None) -> Iterator[None]:
    """Make vec2text's hub names resolve to folders under `root`; None: to the hub and its cache."""
    if root is None:
        yield
        return
    with contextlib.chdir(root):
        yield


@contextlib.contextmanager
def _no_metrics() -> Iterator[None]:
    """Keep vec2text's trainers from downloading three metrics that are only used in training."""
    import evaluate

    load, evaluate.load = evaluate.load, lambda *_, **__: None
    try:
        yield
    finally:
        evaluate.load = load


def load_vec2text(path: str | Path | None = None) -> Any:
    """vec2text's own Corrector over the checkpoints of `gtr-jxe`, as its API builds it.

    path: folder with sentence-transformers/gtr-t5-base, t5-base (configuration, weights and tokenizer) and the two jxm
    checkpoints; None: the hub. Raises InputError where files are missing.
    """
    contract = GTR_CODECS[CODEC]
    folders = repository_folders(CODEC, path)
    root = None if path is None else Path(path)
    if root is not None and not (root / T5 / "config.json").is_file():
        raise InputError(
            f"the vec2text package needs {T5} in {root} besides the codec; download config.json, model.safetensors and "
            f"the tokenizer's files of https://huggingface.co/{T5} to {root / T5}/"
        )
    import vec2text
    from vec2text.models import CorrectorEncoderModel, InversionModel
    from vec2text.models.config import InversionConfig

    models = []
    with _names_under(root), _no_metrics():
        for repository, kind in (
            (contract.hypothesizer, InversionModel),
            (contract.corrector, CorrectorEncoderModel),
        ):
            model = kind(InversionConfig(**read_config(folders[repository].resolve())))
            missing, unexpected = model.load_state_dict(
                read_weights(folders[repository].resolve()), strict=False
            )
            tied = ("embed_tokens.weight", "lm_head.weight", "shared.weight")  # saved once, under either name
            if lost := [*unexpected, *(name for name in missing if not name.endswith(tied))]:
                raise InputError(
                    f"{folders[repository]} does not fit vec2text's {kind.__name__}: {lost[0]} ({len(lost)} such "
                    "tensors); copy the checkpoint again"
                )
            # vec2text divides by length ** length_penalty; transformers 5 leaves None where 4 had this default.
            model.encoder_decoder.generation_config.length_penalty = 1.0
            models.append(model)
        corrector = vec2text.load_corrector(*models)
    corrector.model.eval()
    corrector.inversion_trainer.model.eval()
    return corrector


def vec2text_ids(
    corrector: Any, vectors: Tensor, steps: int, beam_width: int = 0, max_length: int = MAX_TOKENS
) -> list[list[int]]:
    """vec2text's token ids for (B, D) vectors on the encoder's own scale: no start token, cut after the end token.

    max_length: maximum tokens, start token included; its API generates up to 128 for models trained on 32.
    """
    kwargs = {**corrector.gen_kwargs, "min_length": 1, "max_length": max_length}
    vectors = vectors.to(corrector.inversion_trainer.model.device)
    with torch.no_grad():
        if steps == 0:
            ids = corrector.inversion_trainer.generate({"frozen_embeddings": vectors}, kwargs)
        else:
            corrector.return_best_hypothesis = beam_width > 0
            ids = corrector.generate(
                {"frozen_embeddings": vectors},
                kwargs,
                num_recursive_steps=steps,
                sequence_beam_width=beam_width,
            )
    rows = []
    for row in ids[:, 1:].tolist():
        rows.append(row[: row.index(END_ID) + 1] if END_ID in row else [i for i in row if i != PAD_ID])
    return rows


def embed(corrector: Any, texts: Sequence[str]) -> Tensor:
    """vec2text's own vectors of texts, (N, D) float32, not normalised."""
    batch = corrector.embedder_tokenizer(
        list(texts), max_length=MAX_TOKENS, truncation=True, padding="max_length", return_tensors="pt"
    )
    with torch.no_grad():
        vectors: Tensor = corrector.call_embedding_model(batch.input_ids, batch.attention_mask)
    return vectors


class PackageInverter:
    """Vectors to texts with the vec2text package; has the methods of `lvm.codec.inverter.Inverter` that `Codec.decode`
    calls."""

    def __init__(self, corrector: Any, to_texts: Callable[[Sequence[Sequence[int]]], list[str]]) -> None:
        self._corrector, self._to_texts = corrector, to_texts

    def invert(
        self,
        vectors: npt.NDArray[np.float32],
        steps: int | Sequence[int] = 0,
        target_cosine: float | None = None,
        starts: Sequence[str | None] | None = None,
    ) -> list[Inversion]:
        """Texts of (B, D) vectors on the encoder's own scale, in order; cosines use vec2text's own embedding.

        Raises InputError on a target cosine or starts, which vec2text does not support.
        """
        if target_cosine is not None or starts is not None:
            raise InputError(
                "vec2text supports no target cosine and no starts; leave them out, or use engine lvm"
            )
        wanted = np.broadcast_to(np.asarray(steps, np.int64), (len(vectors),))
        done: list[Inversion | None] = [None] * len(vectors)
        for number in np.unique(wanted).tolist():
            rows = np.flatnonzero(wanted == number)
            given = torch.from_numpy(np.ascontiguousarray(vectors[rows]))
            ids = vec2text_ids(self._corrector, given, number)
            texts = self._to_texts(ids)
            own = embed(self._corrector, texts).cpu()
            cosines = torch.cosine_similarity(own, given).tolist()
            for row, text, cosine, tokens in zip(rows, texts, cosines, ids, strict=True):
                done[row] = Inversion(text, cosine, number, tuple(tokens))
        return [row for row in done if row is not None]
