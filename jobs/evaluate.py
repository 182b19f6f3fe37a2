"""Evaluate predictors on held-out articles: reads vectors, index and models, writes one folder.

    python -m jobs.evaluate --vectors out/vectors --index out/index --models out/models --output out/evaluation
    ray job submit --working-dir . -- python -m jobs.evaluate --vectors /shared/vectors …

Writes evaluation.json (everything, one versioned record), leaderboard.md and report.html (one file, opens
without network), each under a temporary name and then renamed. Prints the leaderboard and examples of decoded
text. Scoring and decoding run as Ray tasks beside each other; latency is measured afterwards in this process,
one model at a time, so that nothing of ours disturbs it. When all three files are there for the same inputs
and settings, nothing is computed again.
"""

import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from jobs._ray import Address, connect, finish, run, say, versions
from lvm.codec.identity import CodecIdentity, require_same_codec
from lvm.codec.ladder import Answer, Decoder, Ladder, Nearest
from lvm.codec.zoo import load_codec, pick_device
from lvm.errors import InputError, LvmError, OutputError
from lvm.evaluate.baselines import (
    Batches,
    CorpusMean,
    RidgeSettings,
    context_mean,
    copy_last,
    describe,
    fit_ridge,
    mean_cosine,
)
from lvm.evaluate.leaderboard import (
    RULES,
    SCHEMA,
    Entry,
    Evaluation,
    Example,
    TextRow,
    as_text,
    example_text,
    gate_word,
    judge,
    leaderboard,
    markdown_page,
    ranking,
)
from lvm.evaluate.metrics import (
    LATENCY_BATCHES,
    Ints,
    Pool,
    Predict,
    WindowScores,
    clustered_interval,
    cosines,
    histogram,
    measure_latency,
    peak_bytes,
    score_windows,
    summarise_attention,
    summarise_ranks,
    text_scores,
)
from lvm.evaluate.report import html_page
from lvm.predict.record import Record, load_record
from lvm.predict.steer import allowed_neighbours, snap, unit
from lvm.vectors.index import Index, load_index
from lvm.vectors.sequences import VectorArray, Windows, WindowSettings, make_windows, open_vectors
from lvm.vectors.shards import Manifest, fingerprint, write_bytes, write_json
