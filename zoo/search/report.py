"""The report of a search: one HTML file that needs nothing else, to look at, to print, and to keep.

What can be said in tables is written here; plots are drawn by the script in `report.html` from the data embedded in the
page. Every text that comes from outside is escaped on its way in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from zoo.quantity import format_quantity
from zoo.search.agreement import section
from zoo.search.latencies import BOUND

COLOURS = ("#2f66b3", "#b45f06", "#2b7d56", "#a63a72", "#6a51a8", "#7d6a10", "#1f7a8c", "#7a4a2e")
"""Of the mixers: told apart with every kind of colour vision, and dark enough for white letters."""
PHASES = {
    "train": ("training", "#2b7d56"),
    "measure": ("telling latency", "#2f66b3"),
    "repair": ("fitting to the budget", "#6a51a8"),
    "propose": ("proposing", "#b45f06"),
    "spec": ("making specs", "#1f7a8c"),
    "write": ("writing", "#7d6a10"),
}
BEST_SHOWN = 10
"""Architectures that are shown where a single objective leaves a front of one."""
REASONS_SHOWN = 12
FIRST = ("params", "flops", "latency", "state", "memory", "decode")

Row = Mapping[str, Any]


def html(data: Mapping[str, Any]) -> str:
    """The page for the content of results.json."""
    return _Page(data).html()


class _Page:
    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = data
        self.trials: Sequence[Row] = data["trials"]
        self.latency: Mapping[str, Row] = data["latency"]
        self.objectives: Sequence[Row] = data["objectives"]
        self.by_number = {trial["number"]: trial for trial in self.trials}
        self.complete = [trial for trial in self.trials if trial["status"] == "complete"]
        self.multi = len(self.objectives) > 1
        self.rows = self._rows()
        self.kinds = _kinds(self.trials)
        self.name = data["space"]["name"] or "an unnamed space"

    def _rows(self) -> list[Row]:
        """The front, or the best few where there is a single objective."""
        if self.multi:
            return [self.by_number[number] for number in self.data["front"]]
        sign = -1 if self.objectives[0]["direction"] == "maximize" else 1
        return sorted(self.complete, key=lambda trial: sign * trial["values"][0])[:BEST_SHOWN]

    def html(self) -> str:
        data = self.data
        rows = "The front" if self.multi else f"The best {len(self.rows)}" if len(self.rows) > 1 else "The best"
        parts: dict[str, str] = {
            "title": escape(f"Search of {self.name}"),
            "heading": escape(f"Search of {self.name}"),
            "lead": self._lead(),
            "budget": "".join(map(self._chip, data["terms"])) or "<li>no budget</li>",
            "verdict": self._verdict(),
            "tiles": self._tiles(),
            "plot_note": self._plot_note(),
            "map_heading": f"{rows}, layer by layer",
            "map": self._map(),
            "map_legend": "".join(
                f'<li><i style="background:{kind["colour"]}"></i>{escape(kind["text"])} '
                f"{escape(name or 'no mixer')}</li>"
                for name, kind in self.kinds.items()
            ),
            "front_heading": f"{rows} under the budget",
            "front_note": "How much of each bound is used, and what is left of it. "
            + ("No other candidate is better in one objective without being worse in another." if self.multi else ""),
            "front": self._table(self.rows),
            "agreement": section(data["finalists"], data["terms"]),
            "baselines_note": "The same mixer in every layer, trained first and in the same way as all others. "
            "Where the budget did not allow one as it was, it was made to fit.",
            "baselines": self._table([trial for trial in self.trials if trial["baseline"]]),
            "history_note": self._history_note(),
            "time_note": self._time_note(),
            "time": self._time(),
            "failed_note": self._failed_note(),
            "failed": self._failed(),
            "command": escape(data["command"] or "run_search(...), called from Python"),
            "facts": self._facts(),
            "count": str(len(self.trials)),
            "all": self._table(self.trials, everything=True),
            "footer": escape(f"zoo {data['versions'].get('zoo-nas', '')}, started {data['started']}"),
            "data": _embedded(self._embedded()),
        }
        # One pass, so that nothing from outside is taken for a placeholder.
        return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _template())

    def _lead(self) -> str:
        names = [f"{'highest' if o['direction'] == 'maximize' else 'lowest'} {o['name']}" for o in self.objectives]
        size = self.data["space"]["size"]
        space = "a space with real-valued holes" if size is None else f"{_large(size)} architectures"
        bounds = [f" {name}: {BOUND}." for name, origin in self.latency.items() if origin["kind"] == "roofline"]
        return escape(f"Looking for the {' and the '.join(names)} among {space}.{''.join(bounds)}")

    def _chip(self, term: Row) -> str:
        """A term of the budget, with where its figure comes from unless that was counted or measured."""
        origin = self.latency.get(term["figure"])
        kind = "measured" if origin is None else origin["kind"]
        said = {"measured": "", "predicted": ", predicted", "roofline": f", {BOUND}"}[kind]
        return f"<li>{escape(term['shown'] + said)}</li>"

    def _verdict(self) -> str:
        mixing = self.data["mixing"]
        if mixing is None:
            return ""
        helped = (mixing["gain"] or 0) > 0 and mixing["sentence"].startswith("Mixing helped")
        return f'<p class="verdict{"" if helped else " none"}">{escape(mixing["sentence"])}</p>'

    def _tiles(self) -> str:
        counts, best = self.data["counts"], self.by_number.get(self.data["best"])
        tiles = []
        if best is not None:
            tiles += [
                (self._shown(o["figure"], value), f"{o['name']} of the best")
                for o, value in zip(self.objectives, best["values"], strict=True)
            ]
            if all(o["figure"] != "params" for o in self.objectives):
                tiles.append((self._shown("params", best["metrics"].get("params")), "parameters of the best"))
        trained = counts["complete"] + counts["pruned"] + counts["failed"]
        tiles.append((str(trained), f"of {self.data['trials_wanted']} candidates trained"))
        if self.multi:
            tiles.append((str(len(self.data["front"])), "on the front"))
        tiles.append((_duration(sum(self.data["seconds"].values())), "in all"))
        return "".join(f"<div><b>{escape(value)}</b><span>{escape(text)}</span></div>" for value, text in tiles)

    def _plot_note(self) -> str:
        where = "On the front no candidate is beaten in every objective. " if self.multi else ""
        return escape(f"{where}Diamonds are the homogeneous baselines.")

    def _map(self) -> str:
        deepest = max((len(trial["shape"]["layers"]) for trial in self.rows), default=0)
        if not deepest:
            return "<p>No candidate is complete yet.</p>"
        baselines = [t for t in self.complete if t["baseline"] and t not in self.rows]
        deepest = max([deepest, *(len(trial["shape"]["layers"]) for trial in baselines)])
        widest = max(
            (layer[5] or 0 for trial in [*self.rows, *baselines] for layer in trial["shape"]["layers"]), default=0
        )
        first = self.objectives[0]
        head = (
            f'<th scope="col">trial</th><th scope="col" class="side">{escape(first["name"])}</th>'
            '<th scope="col" class="side">width</th><th scope="col" class="side">layers</th>'
            + "".join(f'<th scope="col">{index}</th>' for index in range(1, deepest + 1))
        )
        body = "".join(self._map_row(trial, widest) for trial in self.rows)
        if baselines:
            body += f'<tr class="split"><th colspan="{deepest + 4}">baselines</th></tr>'
            body += "".join(self._map_row(trial, widest) for trial in baselines)
        return f'<table class="map"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'

    def _map_row(self, trial: Row, widest: int) -> str:
        shape = trial["shape"]
        cells = []
        for mixer, fields, channel, channel_fields, width, hidden in shape["layers"]:
            kind = self.kinds[mixer]
            about = " + ".join(filter(None, (_with(mixer, fields), _with(channel, channel_fields))))
            about += f", hidden {hidden}" if hidden and f"hidden={hidden}" not in channel_fields else ""
            about += f", width {width}" if width != shape["width"] else ""
            share = 100 * (hidden or 0) / (widest or 1)
            cells.append(
                f'<td class="layer" title="{escape(about)}"><i style="background:{kind["colour"]}">'
                f'{escape(kind["text"])}</i><s><u style="width:{share:.0f}%"></u></s></td>'
            )
        name = f"{trial['number']}" + (f" all {trial['baseline']}" if trial["baseline"] else "")
        value = self._shown(self.objectives[0]["figure"], trial["values"][0])
        return (
            f'<tr><th scope="row">{escape(name)}</th><td class="number">{escape(value)}</td>'
            f'<td class="number">{shape["width"]}</td><td class="number">{len(shape["layers"])}</td>'
            f"{''.join(cells)}</tr>"
        )

    def _table(self, trials: Iterable[Row], *, everything: bool = False) -> str:
        """Trials with their objectives, and with each term's figure and the share of its bound that it uses."""
        rows = list(trials)
        if not rows:
            return "<p class=lead>None.</p>"
        terms = self.data["terms"]
        bounded = [term["figure"] for term in terms]
        plain = [objective["figure"] for objective in self.objectives if objective["figure"] not in bounded]
        if everything:
            plain += [name for name in self.data["dimensions"] if name not in [*plain, *bounded]]
        elif "params" not in [*plain, *bounded]:
            plain.append("params")
        heads = "".join(f'<th scope="col" class="number">{escape(name)}</th>' for name in plain)
        heads += "".join(f'<th scope="col">{escape(term["shown"])}</th>' for term in terms)
        body = []
        for trial in rows:
            metrics = trial["metrics"]
            cells = [f'<td class="number">{escape(self._shown(name, metrics.get(name)))}</td>' for name in plain]
            cells += [self._use(term, metrics.get(term["figure"])) for term in terms]
            cells.append(f"<td>{escape(_words(trial))}</td><td>{self._tags(trial)}</td>")
            best = ' class="best"' if trial["number"] == self.data["best"] else ""
            body.append(f'<tr{best}><th scope="row">{trial["number"]}</th>{"".join(cells)}</tr>')
        head = f'<th scope="col">trial</th>{heads}<th scope="col">architecture</th><td></td>'
        return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"

    def _use(self, term: Row, value: float | None) -> str:
        if value is None:
            return "<td>–</td>"
        shown = escape(self._shown(term["figure"], value))
        if not term["high"]:
            return f"<td class=use>{shown}</td>"
        share = value / term["high"]
        left = f"{1 - share:.0%} left" if share <= 1 else f"{share - 1:.0%} over"
        meter = f'<span class="meter"><i style="width:{min(share, 1):.0%}"></i></span>'
        return f'<td class="use">{meter}{shown} · {left}</td>'

    def _tags(self, trial: Row) -> str:
        tags = []
        if trial["number"] == self.data["best"]:
            tags.append('<span class="tag">best</span>')
        elif trial["front"]:
            tags.append('<span class="tag">front</span>')
        if trial["baseline"]:
            changed = ", made to fit" if trial["adjusted"] else ""
            tags.append(f'<span class="tag plain">all {escape(trial["baseline"])}{changed}</span>')
        if trial["status"] != "complete":
            tags.append(f'<span class="tag plain">{escape(trial["status"])}</span>')
        return " ".join(tags)

    def _history_note(self) -> str:
        first = self.objectives[0]["name"]
        return escape(f"{first} of each candidate in the order in which they were done, and the best so far as a line.")

    def _time_note(self) -> str:
        seconds = self.data["seconds"]
        total, train = sum(seconds.values()), seconds.get("train", 0.0)
        share = train / total if total else 0.0
        return escape(f"{_duration(total)} over all sessions, {share:.0%} of it training.")

    def _time(self) -> str:
        seconds = {name: spent for name, spent in self.data["seconds"].items() if name in PHASES}
        total = sum(seconds.values()) or 1.0
        bars, items = [], []
        for name, (text, colour) in PHASES.items():
            if name in seconds:
                bars.append(f'<i style="width:{100 * seconds[name] / total:.2f}%;background:{colour}"></i>')
                items.append(
                    f'<li><i style="background:{colour}"></i>{text} {_duration(seconds[name])}'
                    f" ({seconds[name] / total:.1%})</li>"
                )
        return f'<div class="stack" role="presentation">{"".join(bars)}</div><ul class="legend">{"".join(items)}</ul>'

    def _failed_note(self) -> str:
        counts = self.data["counts"]
        texts = []
        if counts["pruned"]:
            texts.append(f"{counts['pruned']} stopped early for being worse")
        if counts["failed"]:
            texts.append(f"{counts['failed']} broke down")
        if counts["dropped"]:
            texts.append(f"{counts['dropped']} measured outside the budget and never trained")
        return escape("; ".join(texts).capitalize() + "." if texts else "Every candidate was trained to the end.")

    def _failed(self) -> str:
        rows = [trial for trial in self.trials if trial["status"] in ("failed", "dropped")]
        if not rows:
            return ""
        body = "".join(
            f'<tr><th scope="row">{trial["number"]}</th><td>{escape(trial["status"])}</td>'
            f"<td>{escape(trial['reason'])}</td></tr>"
            for trial in rows[:REASONS_SHOWN]
        )
        more = len(rows) - REASONS_SHOWN
        rest = f"<p class=lead>and {more} more in results.json</p>" if more > 0 else ""
        return f"<table><tbody>{body}</tbody></table>{rest}"

    def _facts(self) -> str:
        data, identity = self.data, self.data["identity"]
        size = data["space"]["size"]
        training = {k.removeprefix("train."): v for k, v in identity.items() if k.startswith("train.")}
        facts = {
            "seed": data["seed"],
            "sampler": f"{identity.get('sampler')}, pruner {identity.get('pruner')}",
            "device": data["device"],
            "latency": identity.get("latency"),
            "versions": ", ".join(f"{name} {version}" for name, version in data["versions"].items()),
            "space": f"{data['space']['name'] or 'unnamed'}, {data['space']['hash']}, "
            f"{data['space']['decisions']} decisions" + ("" if size is None else f", {_large(size)} architectures"),
            "training": ", ".join(f"{name} {value}" for name, value in training.items() if value is not None),
        }
        return "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in facts.items() if v is not None)

    def _shown(self, name: str, value: float | None) -> str:
        if value is None:
            return "–"
        dimension = self.data["dimensions"].get(name, "number")
        return f"{value:.4g}" if dimension == "number" else format_quantity(value, dimension)

    def _embedded(self) -> dict[str, Any]:
        """What the script needs."""
        data = self.data
        figures = [objective["figure"] for objective in self.objectives]
        bounded = [term["figure"] for term in data["terms"]]
        order = list(dict.fromkeys([*figures, "loss", "accuracy", "bits_per_byte", *bounded, *FIRST]))
        names = data["dimensions"]
        ordered = [name for name in order if name in names] + [name for name in names if name not in order]
        across = next((name for name in [*figures[1:], *bounded, "params"] if name in names), figures[0])
        return {
            "objectives": self.objectives,
            "terms": data["terms"],
            "dimensions": {name: names[name] for name in ordered},
            "shown": [name for name in order if name in names],
            "axes": [across, figures[0]],
            "best": data["best"],
            "kinds": self.kinds,
            "trials": [
                {key: trial[key] for key in ("number", "status", "front", "baseline", "metrics", "shape", "reason")}
                for trial in self.trials
            ],
        }


@cache
def _template() -> str:
    return Path(__file__).with_name("report.html").read_text(encoding="utf-8")


def _embedded(value: Any) -> str:
    """JSON that nothing inside can end early: a `<` never stands for itself."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _kinds(trials: Iterable[Row]) -> dict[str, dict[str, str]]:
    """Colour and letters of each mixer, the most frequent first; letters are unique."""
    counts: dict[str, int] = {}
    for trial in trials:
        for layer in trial["shape"]["layers"]:
            counts[layer[0]] = counts.get(layer[0], 0) + 1
    found: dict[str, dict[str, str]] = {}
    taken: set[str] = set()
    for index, name in enumerate(sorted(counts, key=lambda name: (-counts[name], name))):
        text = next(text for text in _abbreviations(name) if text not in taken)
        taken.add(text)
        hue = (index * 47) % 360
        colour = COLOURS[index] if index < len(COLOURS) else f"hsl({hue} 45% 38%)"
        found[name] = {"text": text, "colour": colour if name else "#8a857b"}
    return found


def _abbreviations(name: str) -> Iterable[str]:
    words = re.findall(r"[A-Za-z]+|\d+", name)
    if not words:
        yield "–"
    yield "".join(word[0] if word.isalpha() else word for word in words).upper()[:3]
    yield name[:2].title()
    yield name[:3].title()
    number = 1
    while True:
        yield f"{name[:1].upper()}{number}"
        number += 1


def _words(trial: Row) -> str:
    """An architecture in a line: its width, and how many layers of each mixer."""
    counts: dict[str, int] = {}
    for layer in trial["shape"]["layers"]:
        name = layer[0] or layer[2]
        counts[name] = counts.get(name, 0) + 1
    return f"width {trial['shape']['width']}: " + ", ".join(f"{count} {name}" for name, count in counts.items())


def _with(name: str, fields: str) -> str:
    return f"{name} ({fields})" if name and fields else name


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _large(number: int) -> str:
    """A count that may be astronomical."""
    if number < 1_000_000:
        return f"{number:,}"
    text = str(number)
    return f"{text[0]}.{text[1]} × 10^{len(text) - 1}"
