"""A pytest plugin that puts specs under test: `pytest --zoo-specs specs/`.

Every `.yaml` or `.yml` file below the folder becomes a test. It fails with file, line and column if the file is not a
valid spec or space, if the model cannot be built on `meta`, if what is built does not hold the parameters that were
counted, or if the counts differ from those under `published`. Of a space the point with the first value everywhere is
built.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("zoo").addoption(
        "--zoo-specs",
        action="append",
        default=[],
        metavar="FOLDER",
        help="test every spec and space of a folder, or one file; may be given several times",
    )


def pytest_configure(config: pytest.Config) -> None:
    for name in config.getoption("--zoo-specs") or []:
        if not Path(name).exists():
            raise pytest.UsageError(f"--zoo-specs: no such file or folder: {name}")
        config.args.append(name)


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    if file_path.suffix not in (".yaml", ".yml"):
        return None
    wanted = [Path(name).resolve() for name in parent.config.getoption("--zoo-specs") or []]
    if any(file_path.resolve().is_relative_to(folder) for folder in wanted):
        return SpecFile.from_parent(parent, path=file_path)
    return None


class SpecFile(pytest.File):
    """A file of `--zoo-specs`."""

    def collect(self) -> Iterator[pytest.Item]:
        yield SpecItem.from_parent(self, name="spec")


class SpecTestError(Exception):
    """What is wrong with a spec, without the traceback that found it."""


class SpecItem(pytest.Item):
    """The test of one file."""

    def runtest(self) -> None:
        from zoo.spec.check import check
        from zoo.spec.document import parse

        checked = check(self.path)
        if checked.problems:
            raise SpecTestError("\n".join(str(problem) for problem in checked.problems))
        self.build(checked.spec if checked.spec is not None else self.first_point(), parse)

    def first_point(self) -> Any:
        """The spec of a space in which every hole takes its first value."""
        from zoo.search.space import load_space

        space = load_space(self.path)
        return space.spec_at(space.normalised({}))

    def build(self, spec: Any, parse: Any) -> None:
        """Build on `meta`, and compare what was built and what is printed with the spec."""
        from zoo.accounting import metrics
        from zoo.model import build
        from zoo.spec.document import dump

        model = build(spec, device="meta")
        built = sum(parameter.numel() for parameter in model.parameters())
        counted = metrics(spec)["params"]
        if built != counted:
            raise SpecTestError(f"{self.path}: {counted:,} parameters are counted, {built:,} built")
        if parse(dump(spec)) != spec:
            raise SpecTestError(f"{self.path}: printed and read again it is another spec:\n{dump(spec)}")

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        if isinstance(excinfo.value, SpecTestError):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, f"spec {self.path.name}"
