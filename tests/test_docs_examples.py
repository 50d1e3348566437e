"""What the documents show works: specs and spaces are valid, short programs run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from zoo.errors import SpecError
from zoo.search.space import Space
from zoo.spec.check import is_open
from zoo.spec.document import finished, read_text_as
from zoo.spec.source import parse_yaml

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
WHOLE = {"stem", "body", "head"}
COMPLETED = {
    "width": "width: 256",
    "stem": "stem: {type: token, vocab: 256}",
    "body": "body: {layers: [{mixer: {type: attention, heads: 4}}]}",
    "head": "head: language_model",
}
"""What a part of a model that a document shows is completed with."""


def blocks(language: str) -> Iterator[tuple[str, str]]:
    """Every fenced block of a language: where it begins, and its text."""
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for found in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            yield f"{path.name}:{text[: found.start()].count(chr(10)) + 2}", found[1]


def specs() -> dict[str, str]:
    """The YAML blocks, parts of a model completed to whole ones."""
    found = {}
    for place, text in blocks("yaml"):
        missing = [key for key in COMPLETED if key not in parse_yaml(text).entries]
        found[place] = "\n".join([text.rstrip(), *(COMPLETED[key] for key in missing), ""])
    return found


def test_the_documents_show_specs_and_programs() -> None:
    whole = [place for place, text in blocks("yaml") if parse_yaml(text).entries.keys() >= WHOLE]
    assert len(whole) >= 3 and len([*blocks("python")]) >= 3


@pytest.mark.parametrize("place", specs())
def test_every_spec_and_space_is_valid(place: str) -> None:
    template = read_text_as(specs()[place], place)
    if is_open(template):
        Space.from_template(template).validate()
    else:
        finished(template)


@pytest.mark.parametrize("place", dict(blocks("python")))
def test_every_program_runs(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = dict(blocks("python"))[place]
    for text in specs().values():
        name = re.match(r"# ([a-z]+\.yaml)", text)
        if name is not None:
            (tmp_path / name[1]).write_text(text)
    monkeypatch.chdir(tmp_path)
    program = compile(code, place, "exec")
    # A component that was registered here would be found by other tests.
    if "@register" not in code:
        exec(program, {"__name__": "example"})


def test_the_error_in_the_readme_is_what_the_program_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"^\$ zoo validate hybrid\.yaml\n(.*?)^\$", readme, re.DOTALL | re.MULTILINE)
    (text,) = (text for _, text in blocks("yaml") if text.startswith("# hybrid.yaml"))
    assert shown is not None
    with pytest.raises(SpecError) as error:
        finished(read_text_as(text.replace("kv_heads", "kv_hedas"), "hybrid.yaml"))
    assert shown[1].rstrip() == str(error.value)
