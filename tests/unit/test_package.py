"""What `import lvm` offers, that it loads when it is used, and that nothing heavy comes before."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lvm

HEAVY = ("torch", "ray", "numpy", "faiss", "transformers", "pyarrow")


def modules_after(code: str) -> set[str]:
    """Of HEAVY those that a fresh Python has loaded after `code`."""
    shown = f"{code}\nimport sys; print('loaded', *(m for m in {HEAVY} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_all_is_sorted_and_every_name_is_there() -> None:
    assert lvm.__all__ == sorted(lvm.__all__)
    assert [n for n in lvm.__all__ if not hasattr(lvm, n)] == []
    assert set(lvm.__all__) <= set(dir(lvm))


def test_the_names_for_type_checkers_are_those_that_load() -> None:
    tree = ast.parse(Path(lvm.__file__).read_text())
    (checked,) = [n for n in tree.body if isinstance(n, ast.If)]
    seen = {
        alias.name: node.module
        for node in checked.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == lvm._MODULE_OF
    assert sorted(seen) == lvm.__all__


def test_every_name_is_that_of_its_module() -> None:
    for name, module in lvm._MODULE_OF.items():
        assert getattr(lvm, name) is getattr(sys.modules[module], name)


def test_an_unknown_name_is_an_attribute_error_that_lists_the_known_ones() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'load_codek'; it offers Codec, .*load_codec"):
        _ = lvm.load_codek


def test_the_library_and_the_command_load_neither_torch_nor_ray() -> None:
    assert modules_after("import lvm, lvm.cli") == set()
    helped = "import lvm.cli\ntry:\n    lvm.cli.app(['--help'])\nexcept SystemExit:\n    pass"
    assert modules_after(helped) == set()
    assert modules_after("import lvm; lvm.InputError, lvm.CodecIdentity") == set()


def test_cutting_a_text_loads_no_torch_and_loading_a_codec_no_ray() -> None:
    assert "torch" not in modules_after("import lvm; lvm.chunk('One text. Another.')")
    loaded = modules_after("import lvm; lvm.load_codec, lvm.Generator, lvm.fit, lvm.open_vectors")
    assert "torch" in loaded
    assert "ray" not in loaded
