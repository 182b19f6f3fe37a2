import subprocess
import sys

import lvm


def test_all_is_sorted_and_every_name_is_there() -> None:
    assert lvm.__all__ == sorted(lvm.__all__)
    assert [n for n in lvm.__all__ if not hasattr(lvm, n)] == []


def test_the_library_and_the_command_load_neither_torch_nor_ray() -> None:
    code = (
        "import sys, lvm, lvm.cli; print([m for m in ('torch', 'ray', 'numpy', 'faiss') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
