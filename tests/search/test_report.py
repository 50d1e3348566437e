from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeEvaluator, search

from zoo.search.report import _abbreviations, _kinds, _large, html
from zoo.search.results import mixing, write_results
from zoo.search.space import Space

NASTY = "</script><script>alert(1)</script><!-- {{data}} \" ' & é"


class Page(HTMLParser):
    """Text, tags and scripts of a page; complains about what is closed wrongly."""

    VOID = {"meta", "input", "br", "link", "img"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.stack.append(tag)
        if tag == "script":
            self.scripts.append("")
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1] == "script":
            self.scripts[-1] += data
        else:
            self.text.append(data)


def report(folder: Path) -> tuple[Page, str, dict[str, Any]]:
    text = (folder / "report.html").read_text()
    page = Page(text)
    return page, " ".join(" ".join(page.text).split()), json.loads(page.scripts[0])


def test_the_report_is_one_file_that_holds_everything(tmp_path: Path) -> None:
    def fail(spec: Any) -> str:
        return NASTY if spec.width == 48 else ""

    results = search(
        tmp_path / "run",
        FakeEvaluator(fail),
        objective="loss,params",
        budget="params<=40k latency<=3ms@cpu",
        command="zoo search 'a b.yaml' --trials 20",
        trials=20,
    )
    page, text, data = report(tmp_path / "run")
    assert page.links == [] and len(page.scripts) == 2
    assert not re.search(
        r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(", (tmp_path / "run/report.html").read_text()
    )
    assert "zoo search 'a b.yaml' --trials 20" in text
    assert "params <= 40k" in text and "latency <= 3ms@cpu" in text
    for fact in ("seed 0", "evolution, pruner none", results.data["space"]["hash"], "torch 2.", "optuna 5."):
        assert fact in text
    assert results.data["mixing"]["sentence"] in text
    assert [trial["number"] for trial in data["trials"]] == [trial.number for trial in results.trials]
    assert data["best"] == results.data["best"] and {"loss", "params", "latency@cpu"} <= set(data["dimensions"])
    for identifier in set(re.findall(r'byId\("(\w+)"\)', page.scripts[1])):
        assert page.ids.count(identifier) == 1
    assert "{{" not in text.replace("{{data}}", "")


def test_text_from_outside_cannot_leave_its_place(tmp_path: Path) -> None:
    nasty = json.dumps(NASTY)
    space = Space.parse(f"""
name: {nasty}
width: {{choice: [16, 32]}}
context: 32
stem: {{type: token, vocab: 64}}
head: language_model
body: {{layers: [{{mixer: {{choice: [attention, identity]}}, channel: {{type: mlp, hidden: {{choice: [16, 32]}}}}}}]}}
""")
    search(
        tmp_path / "run",
        FakeEvaluator(lambda spec: NASTY if spec.width == 32 else ""),
        space=space,
        budget="",
        command=NASTY,
        trials=30,
    )
    page, text, _ = report(tmp_path / "run")
    assert len(page.scripts) == 2 and "alert" not in page.scripts[1]
    assert text.count("alert(1)") >= 3
    assert NASTY.split("{{")[0].strip() in text
    best = (tmp_path / "run" / "best.yaml").read_text()
    assert "alert" in best


def test_a_search_with_nothing_to_show_yet_has_a_report(tmp_path: Path) -> None:
    search(tmp_path / "run", timeout=0.0)
    _, text, data = report(tmp_path / "run")
    assert "No candidate is complete yet." in text and data["trials"] == [] and data["best"] is None


def test_one_objective_shows_the_best_few(tmp_path: Path) -> None:
    results = search(tmp_path / "run", trials=15)
    _, text, _ = report(tmp_path / "run")
    assert "The best 10, layer by layer" in text
    assert len(results.front) == 1
    assert write_results(tmp_path / "run").data["front"] == [results.data["best"]]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ((2.0, 1.8), "Mixing helped"),
        ((2.0, 2.2), "Mixing did not help"),
        ((2.0, 1.99), "no evidence that mixing helps"),
        ((2.0, 2.01), "no evidence that mixing helps"),
        ((2.0, None), "No mixed architecture has been trained"),
    ],
)
def test_whether_mixing_helped_is_said_honestly(tmp_path: Path, values: tuple[float, float | None], said: str) -> None:
    class Given(FakeEvaluator):
        def evaluate(self, spec: Any, *rest: Any) -> Any:
            found = super().evaluate(spec, *rest)
            mixed = len({layer.mixer.type for layer in spec.body.layers}) > 1
            loss = values[1] if mixed and values[1] is not None else values[0]
            return type(found)(metrics={"loss": loss})

    results = search(tmp_path / "run", Given(), trials=3 if values[1] is None else 12, budget="")
    summary = results.data["mixing"]
    assert said in summary["sentence"]
    if values[1] is not None:
        assert summary["gain"] == pytest.approx((2.0 - values[1]) / 2.0)
    assert mixing([], results.objectives) is None


def test_letters_of_mixers_are_unique() -> None:
    names = ["attention", "alibi", "average", "linear_attention", "local_attention", "mamba", "mamba2", "", "a1", "a2"]
    layers = [[name, "", "", "", 8, None] for name in names]
    kinds = _kinds([{"shape": {"layers": layers}}])
    assert len({kind["text"] for kind in kinds.values()}) == len(names)
    assert next(iter(_abbreviations("linear_attention"))) == "LA" and kinds["mamba2"]["text"] == "M2"


def test_large_numbers_stay_readable() -> None:
    assert _large(22_113) == "22,113"
    assert _large(14 * 10**30) == "1.4 × 10^31"


def test_the_page_depends_on_results_json_alone(tmp_path: Path) -> None:
    search(tmp_path / "run", trials=6)
    data = json.loads((tmp_path / "run" / "results.json").read_text())
    assert html(data) == (tmp_path / "run" / "report.html").read_text()
