"""Encode chunks: reads the shards of `latent chunk`, writes one vector shard for each, and a manifest last.

    python -m jobs.encode --input out/chunks --output out/vectors --codec mini
    ray job submit --working-dir . -- python -m jobs.encode --input /shared/chunks --output /shared/vectors

Each chunk shard becomes a vector shard with the same name, rows and order, vectors being plain fixed-size lists. A
shard is written to a temporary file and renamed; its footer names the codec and the SHA-256 of its chunk shard, so a
job that is killed and run again encodes only what is missing. Workers compare the ids of each vector shard with those
of its chunk shard; duplicate ids are detected when the memory-mapped array is made (lvm/vectors/array.py), before the
manifest is written. The driver holds one row per shard and, while it makes the array, 8 bytes per chunk. On disk a
chunk takes 1.4 KB in float16 or 2.9 KB in float32 in its shard, and as much again in the array.

With --tmd a shard also has `tmd_code` and `tmd_confidence`, by nearest prototype (lvm/corpus/tmd.py), as in an export
of the concept store; existing vectors are kept and get codes.
"""

import functools
import os
import platform
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import typer

from jobs._ray import (
    GPUS_HELP,
    START_TIMEOUT_S,
    Address,
    CodecName,
    CodecPath,
    PathOrUrl,
    accepted,
    connect,
    echo,
    finish,
    grows,
    guarded,
    in_tasks,
    in_words,
    load_codec_at,
    nodes_with,
    path_option,
    ray_data,
    run,
    timing,
    unseen_gpu,
    versions,
)
from lvm.codec.identity import CodecIdentity, require_same_codec
from lvm.corpus.tmd import Prototypes, coder_name, distribution_table
from lvm.devices import seen_gpu
from lvm.errors import IdentityError, InputError, LvmError, OutputError
from lvm.storage import Location
from lvm.vectors.array import write_array
from lvm.vectors.artefact import Artefact
from lvm.vectors.shards import (
    Manifest,
    Shard,
    VectorType,
    file_sha256,
    footer_in,
    read_table,
    shards_at_once,
    table_to_vectors,
    vector_schema,
    vectors_to_table,
    with_footer,
    write_table,
)


class Encoder(Protocol):
    """The part of a codec that this job needs."""

    @property
    def identity(self) -> CodecIdentity: ...

    def encode_chunks(self, texts: list[str]) -> Any:
        """`.vectors` (N, D) float32 of unit norm, `.norms`, `.num_tokens`, `.truncated` of N texts."""


CodecLoader = Callable[[], Encoder]
"""Loads the codec, once per worker; must be picklable."""

MAX_THREADS = 8
"""Maximum threads per actor; the encoder's matrices are too small for more."""

MOST_WORKERS = 1000
"""Default maximum of actors: Ray's autoscaler ignores all requests beyond this number."""

MAX_CHECKS = 16
"""Maximum number of existing shards that are checked in parallel."""

SHARDS_PER_TASK, TASKS_PER_SLOT = 8, 8
"""At most and at least; a task gets a second shard from 16 slots on. Tasks take the driver's time, which on large
clusters would limit how fast small shards are handed out (tests/bench/results/scale_amd-epyc-2core_2026-11.md)."""

SHARDS_PER_ACTOR = {"CPU": 1, "GPU": 3}
"""Shards that an actor encodes in parallel, one thread each; one more is queued, so that it never idles. On a CPU one
shard takes 1.08 times as long as a loop without Ray, two in parallel 1.25 (tests/bench/results/LOG.md). On a GPU three:
while the GPU encodes one, the CPU reads and tokenizes the next and writes the last. Tokenizer, Arrow and torch release
the GIL, so threads suffice and no text is sent between processes. A shard's vectors do not depend on other shards."""


@dataclass(frozen=True)
class EncodeSettings:
    """Everything that determines a vector shard's content."""

    codec: str
    """Digest of the codec's identity."""
    dtype: VectorType = "float16"
    """Storage type of vectors. float16 halves the size and changes a cosine by less than 0.001."""
    tmd: str | None = None
    """Name of the TMD coder (`coder_name`); None for shards without codes."""

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, as in footers; without `tmd` where there are no codes."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class EncodeJob:
    """Everything a worker needs; must be picklable."""

    source: Location
    """Folder of the chunks."""
    target: Location
    """Folder of the vectors."""
    settings: EncodeSettings
    identity: CodecIdentity
    """Codec that the worker must load."""
    load: CodecLoader


@dataclass(frozen=True)
class EncodeResult:
    """Result of `encode_chunks`."""

    manifest: Manifest
    """Of the vectors."""
    encoded: tuple[str, ...]
    """Shards that this run made."""
    up_to_date: bool
    """True if nothing had to be done, not even the manifest."""


# ------------------------------------------------------------------------------------------------ one shard


def footer_of(chunks: Shard, identity: CodecIdentity, settings: EncodeSettings) -> dict[str, Any]:
    """Footer of a vector shard made from this chunk shard with these settings."""
    return {"codec": identity.to_dict(), "chunks_sha256": chunks.sha256, "settings": settings.to_dict()}


def encode_shard(
    source: Location,
    target: Location,
    chunks: Shard,
    codec: Encoder,
    settings: EncodeSettings,
    prototypes: Prototypes | None = None,
) -> Shard:
    """Encode one chunk shard into `target`, unless its vectors exist; with `prototypes`, add TMD codes.

    Raises InputError naming the shard when its checksum differs from its manifest's, or its vectors are not of unit
    norm.
    """
    if (actual := file_sha256(source)) != chunks.sha256:
        raise InputError(
            f"chunk shard {source} has SHA-256 {actual[:16]}…, expected {chunks.sha256[:16]}… as in its manifest: "
            "it changed or was damaged. Run `latent chunk` again; it redoes only that shard."
        )
    table = read_table(source)
    footer = footer_of(chunks, codec.identity, settings)
    plain = footer_of(chunks, codec.identity, replace(settings, tmd=None))
    vectors = kept_vectors(target, table, plain, vector_schema(codec.identity.dim, settings.dtype))
    if vectors is None:
        try:
            encoded = codec.encode_chunks(table.column("text").to_pylist())
            vectors = vectors_to_table(
                table, encoded.vectors, encoded.norms, encoded.num_tokens, encoded.truncated, settings.dtype
            )
        except InputError as err:
            raise InputError(f"shard {source.name}: {err}") from err
    if prototypes is not None:
        # From the vectors as stored, so that new and existing ones get the same codes.
        codes, confidences = prototypes.code(table_to_vectors(vectors).astype(np.float32))
        vectors = vectors.append_column("tmd_code", pa.array(codes))
        vectors = vectors.append_column("tmd_confidence", pa.array(confidences))
    return write_table(target, with_footer(vectors, footer))


def kept_vectors(
    target: Location, chunks: pa.Table, plain: dict[str, Any], schema: pa.Schema
) -> pa.Table | None:
    """Rows of the shard at `target`, without codes, if it is complete and up to date but for its codes; else None.

    plain, schema: expected footer and schema of a shard without codes.
    """
    if not target.exists():
        return None
    try:
        table = read_table(target)
    except InputError:
        return None
    found = footer_in(table.schema)
    found.get("settings", {}).pop("tmd", None)
    if found != plain or not table.column("chunk_id").equals(chunks.column("chunk_id")):
        return None
    return table.select(schema.names).cast(schema)  # Parquet renames the lists' elements


_SHARD = [f.name for f in fields(Shard)]

Made = tuple[Shard, int]
"""A vector shard, and the number of its texts that were truncated."""


def finished_shard(
    target: Location, source: Location, footer: dict[str, Any], known_sha256: str | None = None
) -> Made | None:
    """The vector shard at `target` if it is complete and has the expected footer and the ids of `source`; None if it
    must be encoded. known_sha256: the file's checksum in a manifest."""
    made = Artefact(target.parent, "vectors", {}, _log).finished(target.name, footer, known_sha256)
    if made is None:
        return None
    try:
        return made, require_same_ids(source, target)
    except InputError:
        return None


def require_same_ids(source: Location, target: Location) -> int:
    """The number of truncated chunks of a vector shard that has its chunk shard's ids in order.

    Raises InputError naming the shard and the first id that is missing or unexpected.
    """
    wanted = read_table(source, ["chunk_id"]).column("chunk_id")
    table = read_table(target, ["chunk_id", "truncated"])
    got = table.column("chunk_id")
    if not got.equals(wanted):
        before, after = {*wanted.to_pylist()}, {*got.to_pylist()}
        missing, extra = sorted(before - after), sorted(after - before)
        what = f"lacks {missing[0]}" if missing else f"holds {extra[0]}" if extra else "has another order"
        raise InputError(
            f"vector shard {target} {what}: expected the {len(wanted)} ids of its chunk shard in order, got {len(got)} "
            f"({len(missing)} missing, {len(extra)} unexpected). Delete that file and run `latent encode` again."
        )
    return int(np.sum(table.column("truncated").to_numpy()))


def _log(line: str) -> None:
    echo(f"encode: {line}")


class ShardEncoder:
    """Ray Data's stateful worker: holds the codec, encodes the shards it receives. Several threads may call it."""

    def __init__(self, job: EncodeJob) -> None:
        # Ray limits PyTorch's threads: it sets OMP_NUM_THREADS to the actor's num_cpus. The tokenizer would use a
        # thread per core in each worker.
        os.environ.setdefault("RAYON_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
        self.job = job
        self.failure: LvmError | None = None
        self.note = unseen_gpu()
        try:
            self.codec = job.load()
            worker = f"the worker on {platform.node()}"
            require_same_codec(job.identity, self.codec.identity, "this job", worker)
            encode = lambda texts: self.codec.encode_chunks(texts).vectors  # noqa: E731
            self.prototypes = None if job.settings.tmd is None else Prototypes.of(encode)
        except LvmError as err:
            self.failure = err

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        rows = [
            self.encode(Shard(*values)) for values in zip(*(batch[n].tolist() for n in _SHARD), strict=True)
        ]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def encode(self, chunks: Shard) -> dict[str, Any]:
        """The finished shard's fields."""

        def work() -> dict[str, Any]:
            if self.failure is not None:
                raise self.failure
            source, target = self.job.source / chunks.file, self.job.target / chunks.file
            made = encode_shard(source, target, chunks, self.codec, self.job.settings, self.prototypes)
            return {**asdict(made), "truncated": require_same_ids(source, target)}

        return guarded(work, **asdict(chunks), truncated=0, note=self.note)


# ------------------------------------------------------------------------------------------------ all shards


def encode_chunks(
    source: Location,
    target: Location,
    load: CodecLoader,
    dtype: VectorType = "float16",
    overwrite: bool = False,
    address: str | None = None,
    max_workers: int | None = None,
    gpus: int | None = None,
    tmd: bool = False,
) -> EncodeResult:
    """Make `target` hold exactly the vectors of `source`, the folder of a finished chunk job.

    tmd: add each chunk's code; a folder that has codes keeps them. max_workers: maximum number of actors, with one CPU
    or GPU each; None for as many as the cluster may grow to. gpus: how many to wait for; None for those available.

    Raises InputError when chunks are missing or damaged, or the cluster does not get the requested resources,
    IdentityError when the chunks were made for another tokenizer, OutputError when `target` was made with other
    settings. Finished shards are kept in each case.
    """
    if source.resolve() == target.resolve():
        raise OutputError(f"--output {target} is the --input; choose another folder for the vectors")
    chunks = Manifest.load(source, "chunks")
    chunks.verify(source)
    codec = load()
    identity = codec.identity
    del codec
    require_tokenizer(chunks, identity, source)
    settings = EncodeSettings(identity.digest, dtype)
    inputs = {"chunks": chunks.fingerprint}
    vectors = Artefact(target, "vectors", settings.to_dict(), _log)
    vectors.claim(overwrite)
    earlier = vectors.manifest()
    if tmd or (earlier is not None and "tmd" in earlier.inputs):
        # An input and not a setting, as adding or changing codes keeps the vectors.
        inputs["tmd"] = coder_name()
        settings = replace(settings, tmd=inputs["tmd"])
    done = vectors.current(inputs, deep=True)
    if done is not None:
        if made := write_array(target, done, each=partial(in_tasks, address)):
            echo(f"encode: wrote the missing memory-mapped array of {target} from its shards")
        return EncodeResult(done, (), up_to_date=not made)
    known = vectors.begin()

    def find(shard: Shard) -> Made | None:
        footer = footer_of(shard, identity, settings)
        return finished_shard(target / shard.file, source / shard.file, footer, known.get(shard.file))

    with ThreadPoolExecutor(shards_at_once(chunks.shards, identity.dim, MAX_CHECKS)) as threads:
        found = zip(chunks.shards, threads.map(find, chunks.shards), strict=True)
        finished = {shard.file: made for shard, made in found if made is not None}
    pending = [s for s in chunks.shards if s.file not in finished]
    if finished:
        echo(f"encode: keeping {len(finished)} of {len(chunks.shards)} shards that are finished")
    if pending:
        connect(address)
        job = EncodeJob(source.resolve(), target.resolve(), settings, identity, load)
        for made in _encode_with_ray(job, pending, max_workers, gpus):
            finished[made[0].file] = made

    shards = tuple(finished[s.file][0] for s in chunks.shards)
    manifest = Manifest(
        kind="vectors",
        settings=vectors.settings,
        inputs=inputs,
        shards=shards,
        rows=sum(s.rows for s in shards),
        codec=identity.to_dict(),
        source=chunks.source,
        licence=chunks.licence,
        report={**chunks.report, "truncated": sum(truncated for _, truncated in finished.values())},
        versions=versions(),
    )
    write_array(target, manifest, each=partial(in_tasks, address))
    vectors.publish(manifest)
    return EncodeResult(manifest, tuple(s.file for s in pending), up_to_date=False)


def require_tokenizer(chunks: Manifest, identity: CodecIdentity, source: Location) -> None:
    """Raise IdentityError, naming both, unless the chunks fit this codec's tokenizer and token limit."""
    made_with = chunks.settings.get("tokenizer_sha256")
    limit = chunks.settings.get("max_tokens")
    cure = f"Run `latent chunk` with --codec {identity.name} into another --output, then encode that."
    if made_with != identity.tokenizer_sha256:
        raise IdentityError(
            f"the chunks in {source} were made with tokenizer {str(made_with)[:16]}…, codec {identity} has "
            f"tokenizer {identity.tokenizer_sha256[:16]}…, so their token counts differ. {cure}"
        )
    if not isinstance(limit, int) or limit > identity.max_tokens:
        raise IdentityError(
            f"the chunks in {source} have up to {limit} tokens, codec {identity} takes "
            f"{identity.max_tokens}; the rest would be truncated. {cure}"
        )


def num_tasks(num_shards: int, slots: int) -> int:
    """Number of Ray tasks: one per shard; on large clusters fewer, but enough to even out the end.

    slots: shards that are encoded at a time.
    """
    per_task = min(SHARDS_PER_TASK, slots // 8, num_shards // (slots * TASKS_PER_SLOT))
    return -(-num_shards // max(1, per_task))


def _encode_with_ray(
    job: EncodeJob, pending: list[Shard], max_workers: int | None = None, gpus: int | None = None
) -> Iterator[Made]:
    """Encode shards in parallel; yields each as soon as it is on disk, in any order."""
    import ray

    # Turn off Ray Data's own scaling: with its `request_resources`, an unsatisfiable request starts nothing and blocks
    # other jobs'. The pending actors request the same nodes. Read when ray.data is imported.
    os.environ.setdefault("RAY_DATA_DEFAULT_CLUSTER_SCALING_UP_MAX_CPU_RESOURCE_DELTA", "0")
    os.environ.setdefault("RAY_DATA_DEFAULT_CLUSTER_SCALING_UP_MAX_GPU_RESOURCE_DELTA", "0")
    data = ray_data()
    context = data.DataContext.get_current()
    nodes = nodes_with(gpus, free=False)
    if job.identity.name == "mini" and seen_gpu() == "mps":
        # mini does not use an Apple GPU: an actor per core is faster
        nodes = [{**n, "GPU": 0.0} for n in nodes]
    num_actors, resources = plan(nodes, len(pending))
    kind = "GPU" if "num_gpus" in resources else "CPU"
    most = min(max_workers or MOST_WORKERS, len(pending))
    if grows() and most > num_actors and (max_workers or kind == "CPU"):
        # Request all actors at once, with one CPU each, as the size of future nodes is unknown. The autoscaler starts
        # nodes for pending ones, up to its limit; they end with this process.
        sizes, resources = {"size": most}, {**resources, "num_cpus": 1}
        context.wait_for_min_actors_s = -1
    else:
        # Ray Data waits for the minimum, so that is what fits now; cores of other jobs are used once they are free.
        num_actors = min(num_actors, most)
        room = ray.available_resources().get(kind, 0) // resources[f"num_{kind.lower()}s"]
        sizes = {"min_size": max(1, min(num_actors, int(room))), "max_size": num_actors}
        context.wait_for_min_actors_s = START_TIMEOUT_S
    rows = [asdict(s) for s in pending]
    slots = SHARDS_PER_ACTOR[kind] * (sizes.get("size") or sizes["max_size"])
    finished = data.from_items(rows, override_num_blocks=num_tasks(len(rows), slots)).map_batches(
        ShardEncoder,
        fn_constructor_args=(job,),
        batch_size=1,
        compute=data.ActorPoolStrategy(
            **sizes,
            max_tasks_in_flight_per_actor=SHARDS_PER_ACTOR[kind] + 1,
            max_concurrent_calls_per_actor=SHARDS_PER_ACTOR[kind],
            enable_true_multi_threading=SHARDS_PER_ACTOR[kind] > 1,
        ),
        **resources,
    )
    rows_done = _or_no_workers(finished.iter_rows(), resources, nodes)
    num_chunks = sum(s.rows for s in pending)
    with closing(accepted(rows_done, "encode", len(pending), num_chunks, "chunks")) as made:
        for row in made:
            truncated = row.pop("truncated")
            yield Shard(**row), truncated


def _or_no_workers(
    rows: Iterable[dict[str, Any]], asked: Mapping[str, Any], nodes: Sequence[Mapping[str, float]]
) -> Generator[dict[str, Any], None, None]:
    """The rows. Raises InputError when no worker starts within START_TIMEOUT_S."""
    from ray.exceptions import GetTimeoutError

    try:
        yield from rows
    except GetTimeoutError as err:
        raise InputError(
            f"no worker with {asked} started within {START_TIMEOUT_S} s; the cluster's nodes have {in_words(nodes)}. "
            "Add nodes, or join another cluster with --address"
        ) from err


def plan(nodes: Sequence[Mapping[str, float]], num_shards: int) -> tuple[int, dict[str, Any]]:
    """Number of actors, and resources of each: one GPU and one CPU if there are GPUs, else its share of the CPUs.

    nodes: Ray resources of each live node. On CPUs one actor per core, with one thread, is fastest, as texts are short
    and matrices small. With fewer shards than cores each actor gets several, but no more than fit on one node: a larger
    request would stay pending for ever.
    """
    num_gpus = sum(int(n.get("GPU", 0)) for n in nodes)
    if num_gpus:
        return min(num_gpus, num_shards), {"num_gpus": 1, "num_cpus": 1}
    cpus = [int(n.get("CPU", 0)) for n in nodes]
    num_actors = max(1, min(sum(cpus), num_shards))
    for threads in range(MAX_THREADS, 1, -1):
        if sum(c // threads for c in cpus) >= num_actors:
            return num_actors, {"num_cpus": threads}
    return num_actors, {"num_cpus": 1}


# --------------------------------------------------------------------------------------------------- command


def main(
    input: Annotated[PathOrUrl, path_option("Folder that `latent chunk` wrote.")],
    output: Annotated[PathOrUrl, path_option("Folder for the vector shards.")],
    codec: CodecName = "mini",
    codec_path: CodecPath = None,
    dtype: Annotated[Literal["float16", "float32"], typer.Option(help="Type of stored vectors.")] = "float16",
    overwrite: Annotated[bool, typer.Option(help="Replace vectors made with other settings.")] = False,
    address: Address = None,
    max_workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Maximum number of workers, each with one CPU, or one GPU and one CPU; default: as many as the "
            "cluster may grow to.",
        ),
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help=GPUS_HELP)] = None,
    tmd: Annotated[
        bool,
        typer.Option(
            "--tmd",
            help="Add each chunk's TMD code and confidence, by nearest label; existing vectors are not encoded again, "
            "and a folder that has codes keeps them.",
        ),
    ] = False,
) -> None:
    """Encode chunks to vectors; a second run encodes only what is missing."""
    started = time.perf_counter()
    path = None if codec_path is None else codec_path.resolve()
    load = functools.partial(load_codec_at, codec, path)
    result = encode_chunks(input, output, load, dtype, overwrite, address, max_workers, gpus, tmd)
    made = {s.file: s.rows for s in result.manifest.shards if s.file in result.encoded}
    rows = sum(made.values())
    report = result.manifest.report
    if result.up_to_date:
        echo(f"encode: {output} is up to date ({result.manifest.rows:,} vectors)")
    else:
        echo(
            f"encode: {rows:,} chunks in {len(made)} shards written with {result.manifest.identity}, "
            f"{result.manifest.rows:,} in all, {report['truncated']:,} truncated"
        )
        if "tmd" in result.manifest.inputs:
            shards = (read_table(output / s.file, ["tmd_code"]) for s in result.manifest.shards)
            echo(distribution_table(c for shard in shards for c in shard.column("tmd_code").to_pylist()))
    finish(
        "encode",
        rows=result.manifest.rows,
        encoded_rows=rows,
        **timing(started, rows),
        paths=[str(output)],
        up_to_date=result.up_to_date,
        redone=len(made),
        shards=len(result.manifest.shards),
        truncated=report["truncated"],
        codec=result.manifest.codec,
    )


if __name__ == "__main__":
    run(main)
