"""Components of third parties, found through the entry points of an installed package."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent / "package"


def install(package: Path, site: Path) -> Path:
    """Put a package where Python finds it, with the metadata that an installer writes.

    As an editable install does, without a build backend or an index, so that it works offline.
    """
    project = tomllib.loads((package / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n", encoding="utf-8"
    )
    groups = [
        "\n".join([f"[{group}]", *(f"{name} = {target}" for name, target in points.items())])
        for group, points in project["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n".join(groups) + "\n", encoding="utf-8")
    return site


def python(*arguments: str, paths: list[Path], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run this Python with more places to import from."""
    inherited = [path for path in (os.environ.get("PYTHONPATH"),) if path]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, paths), *inherited]), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False
    )


def broken(folder: Path, source: str) -> list[Path]:
    """An installed package `broken_parts` whose module is `source`."""
    package = folder / "broken"
    package.mkdir()
    (package / "broken_parts.py").write_text(source, encoding="utf-8")
    (package / "pyproject.toml").write_text(
        '[project]\nname = "broken-parts"\nversion = "0"\n'
        '[project.entry-points."zoo.components"]\nbroken = "broken_parts"\n',
        encoding="utf-8",
    )
    return [install(package, folder / "site"), package]


@pytest.mark.slow
def test_an_installed_package_passes_its_own_tests(tmp_path: Path) -> None:
    site = install(PACKAGE, tmp_path)
    run = python("-m", "pytest", "-q", "-p", "no:cacheprovider", paths=[site, PACKAGE], cwd=PACKAGE)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "passed" in run.stdout


def test_without_the_package_its_type_is_unknown(tmp_path: Path) -> None:
    program = "from zoo.registry import Role, find; find(Role.MIXER, 'running_mean')"
    run = python("-c", program, paths=[], cwd=tmp_path)
    assert run.returncode != 0
    assert "unknown mixer 'running_mean'" in run.stderr


@pytest.mark.parametrize(
    "source, complaint",
    [
        ("1 / 0", "division by zero"),
        ("import a_module_that_is_not_there", "a_module_that_is_not_there"),
        (
            "from zoo.component import Component\nfrom zoo.registry import Role, register\n"
            "@register('attention', role=Role.MIXER)\nclass Mine(Component):\n    'Not that one.'\n",
            "'attention' of broken_parts is already registered by zoo.blocks.attention",
        ),
    ],
)
def test_a_broken_package_is_warned_about_and_left_out(tmp_path: Path, source: str, complaint: str) -> None:
    program = "from zoo.registry import Role, find; print(find(Role.MIXER, 'attention').__module__)"
    run = python("-c", program, paths=broken(tmp_path, source), cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "zoo.blocks.attention"
    assert "components of 'broken_parts' could not be loaded" in run.stderr
    assert complaint in run.stderr
