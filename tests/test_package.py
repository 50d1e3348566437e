"""What holds for the package as a whole: who imports whom, what importing costs, and which names it has."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import zoo

PACKAGE = Path(zoo.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
LAYERS = ("errors", "kernels", "core", "blocks", "train", "search", "cli")
"""From the ground up; a module imports from its own layer and from those below."""
UPWARDS = {
    # The registry and the package find components by importing them, and know nothing else of them.
    ("core", "blocks"): {"registry.py", "model.py", "spec/document.py", "__init__.py"},
    # Whether a file is a space is part of whether it is valid.
    ("core", "search"): {"spec/check.py", "pytest_plugin.py", "__init__.py"},
}


def layer(name: str) -> str:
    """The layer of a module, by its dotted name inside the package."""
    head = name.split(".")[0]
    if head == "errors":
        return "errors"
    return "cli" if head == "__main__" else head if head in LAYERS else "core"


def imports(file: Path) -> set[str]:
    """Modules of the package that a file imports when it runs, by dotted names inside the package."""
    found: set[str] = set()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    only_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in only_types:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "zoo":
            inside = node.module.removeprefix("zoo").lstrip(".")
            found |= {inside} if inside else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("zoo.") for alias in node.names if alias.name.startswith("zoo.")}
    return found


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_run_downwards(file: Path) -> None:
    place = file.relative_to(PACKAGE).as_posix()
    own = layer(place.removesuffix(".py").replace("/", "."))
    if place.startswith("testing"):
        return
    for name in imports(file):
        other = layer(name)
        allowed = LAYERS.index(other) <= LAYERS.index(own) or place in UPWARDS.get((own, other), ())
        assert allowed, f"{place} ({own}) imports zoo.{name} ({other})"


def test_exported_names_are_no_modules() -> None:
    # Importing a module `zoo.metrics` would put it in the place of a function of that name.
    assert [name for name in zoo._HOMES if find_spec(f"zoo.{name}") is not None] == []


def test_every_exported_name_is_there() -> None:
    assert all(getattr(zoo, name) is not None for name in zoo.__all__)
    assert zoo.Attention(heads=2) == zoo.Attention(heads=2)
    with pytest.raises(AttributeError, match="did you mean 'Attention'"):
        _ = zoo.Atention


def test_importing_everything_that_reads_specs_leaves_torch_alone() -> None:
    program = "import sys, zoo; zoo.components(); zoo.metrics(zoo.load('gpt2')); zoo.load_space('spaces/hybrid-24')\n"
    done = subprocess.run(
        [sys.executable, "-c", program + "sys.exit(bool({'torch', 'lightning', 'optuna'} & set(sys.modules)))"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_the_links_at_the_top_lead_into_the_package() -> None:
    top = PACKAGE.parent
    for name in ("blocks", "kernels", "search", "cli"):
        assert not (top / name).exists() or (top / name).resolve() == PACKAGE / name
