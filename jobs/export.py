"""Export training sequences as one NPZ file: reads vectors, writes windows in a layout other tools read.

    python -m jobs.export --vectors out/vectors --output sequences.npz --layout sequences
    ray job submit --working-dir . -- python -m jobs.export --vectors /shared/vectors --output /shared/s.npz

Such files hold every vector about six times: 18 KB per sequence. Written block by block, without Ray;
`latent check FILE` validates the file.
"""

import time
from typing import Annotated, Literal

import typer

from jobs._ray import PathOrUrl, echo, finish, path_option, run, timing
from lvm.errors import OutputError
from lvm.storage import local_output
from lvm.vectors.array import open_vectors
from lvm.vectors.npz import export_npz
from lvm.vectors.sequences import MAX_SEED, WindowSettings, make_windows


def main(
    vectors: Annotated[PathOrUrl, path_option("Folder that `latent encode` wrote.")],
    output: Annotated[PathOrUrl, path_option("File to write, FILE.npz.")],
    layout: Annotated[
        Literal["sequences", "documents", "split"], typer.Option(help="Which arrays the file holds.")
    ] = "sequences",
    context: Annotated[int, typer.Option(min=1, help="Context vectors per sequence.")] = 5,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Seed of the split by article, for layout split.")
    ] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
) -> None:
    """Write training sequences as an NPZ file."""
    started = time.perf_counter()
    if output.is_dir() or (output.exists() and not overwrite):
        raise OutputError(f"--output {output} already exists; choose another name or pass --overwrite")
    windows = make_windows(open_vectors(vectors), WindowSettings(context=context))
    with local_output(output) as file:
        export_npz(windows, file, layout, seed)
    size = output.stat().st_size
    echo(f"export: {len(windows):,} sequences of {windows.identity} in {output}, {size / 1e6:,.1f} MB")
    finish(
        "export",
        rows=len(windows),
        **timing(started, len(windows)),
        paths=[str(output)],
        layout=layout,
        bytes=size,
        codec=windows.identity.to_dict(),
    )


if __name__ == "__main__":
    run(main)
