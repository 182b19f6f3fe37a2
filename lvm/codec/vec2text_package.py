"""The original vec2text package as a decode engine, for comparison: `--engine vec2text`, `load_codec(engine=…)`.

vec2text 0.0.13 (Morris et al. 2023, arXiv:2310.06816), used as in its API: always the requested number of steps, and
the last text, even if an earlier one was nearer. It decodes `gtr-jxe`, whose encoder its API uses.

The package was written for transformers 4 and downloads files. The workarounds for transformers 5 and offline use
change no token: models are constructed and then filled with weights, as its nested from_pretrained fails, and metrics
used only in training are not downloaded.
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
"""Hub name of vec2text's T5 configuration and tokenizer."""


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
    checkpoints; None for the hub. Raises InputError if files are missing.
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

    folders = {repository: folder.resolve() for repository, folder in folders.items()}
    kinds = {contract.hypothesizer: InversionModel, contract.corrector: CorrectorEncoderModel}
    models = []
    # In `root`, vec2text's hub names are relative paths.
    with contextlib.nullcontext() if root is None else contextlib.chdir(root), _no_metrics():
        for repository, kind in kinds.items():
            model = kind(InversionConfig(**read_config(folders[repository])))
            missing, unexpected = model.load_state_dict(read_weights(folders[repository]), strict=False)
            tied = ("embed_tokens.weight", "lm_head.weight", "shared.weight")  # saved once, under any name
            if wrong := [*unexpected, *(name for name in missing if not name.endswith(tied))]:
                raise InputError(
                    f"{folders[repository]} does not fit vec2text's {kind.__name__}: {wrong[0]} ({len(wrong)} such "
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
    """vec2text's token ids for (B, D) vectors, not normalised: without the start token, up to the end token.

    max_length: maximum tokens, start token included; its API generates up to 128 with models trained on 32.
    """
    kwargs = {**corrector.gen_kwargs, "min_length": 1, "max_length": max_length}
    vectors = vectors.to(corrector.inversion_trainer.model.device)
    with torch.no_grad():
        if steps == 0:
            ids = corrector.inversion_trainer.generate({"frozen_embeddings": vectors}, kwargs)
        else:
            corrector.return_best_hypothesis = beam_width > 0
            widths = {"num_recursive_steps": steps, "sequence_beam_width": beam_width}
            ids = corrector.generate({"frozen_embeddings": vectors}, kwargs, **widths)
    rows = []
    for row in ids[:, 1:].tolist():
        rows.append(row[: row.index(END_ID) + 1] if END_ID in row else [i for i in row if i != PAD_ID])
    return rows


def embed(corrector: Any, texts: Sequence[str]) -> Tensor:
    """vec2text's own vectors of N texts, (N, D) float32, not normalised."""
    batch = corrector.embedder_tokenizer(
        list(texts), max_length=MAX_TOKENS, truncation=True, padding="max_length", return_tensors="pt"
    )
    with torch.no_grad():
        vectors: Tensor = corrector.call_embedding_model(batch.input_ids, batch.attention_mask)
    return vectors


class PackageInverter:
    """Decodes with the vec2text package; has the one method of `lvm.codec.inverter.Inverter` that `Codec.decode`
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
        """Texts of (B, D) vectors, not normalised, in order; cosines are to vec2text's own vectors of the texts.

        Raises InputError on a target cosine or starts, which vec2text does not support.
        """
        if target_cosine is not None or starts is not None:
            raise InputError(
                "vec2text supports no target cosine and no starts; leave them out, or use engine lvm"
            )
        all_steps = np.broadcast_to(np.asarray(steps, np.int64), (len(vectors),))
        done: dict[int, Inversion] = {}
        for number in np.unique(all_steps).tolist():
            rows = np.flatnonzero(all_steps == number)
            given = torch.from_numpy(np.ascontiguousarray(vectors[rows]))
            ids = vec2text_ids(self._corrector, given, number)
            texts = self._to_texts(ids)
            own = embed(self._corrector, texts).cpu()
            cosines = torch.cosine_similarity(own, given).tolist()
            for row, text, cosine, tokens in zip(rows.tolist(), texts, cosines, ids, strict=True):
                done[row] = Inversion(text, cosine, number, tuple(tokens))
        return [done[row] for row in range(len(vectors))]
