"""Commands that print facts: for people, as JSON, and when something is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.hardware.pretended import PROFILE, PretendedStopwatch
from zoo.cli import main
from zoo.device import resolve_device
from zoo.hardware.calibrate import calibrate
from zoo.hardware.predictor import load_predictor
from zoo.hardware.store import calibration_path

GOOD = "width: 64\nstem: {type: token, vocab: 256}\nbody: {layers: [{mixer: attention}]}\nhead: language_model\n"
SPACE = GOOD.replace("mixer: attention", "mixer: {choice: [mamba2, attention]}")


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Runner:
    """Runs the command line in this process, as the console script does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch = monkeypatch
        self.capsys = capsys

    def __call__(self, *arguments: str | Path) -> Ran:
        self.monkeypatch.setattr(sys, "argv", ["zoo", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        captured = self.capsys.readouterr()
        return Ran(code, str(captured.out), str(captured.err))


@pytest.fixture
def zoo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    monkeypatch.setenv("COLUMNS", "100")
    return Runner(monkeypatch, capsys)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "good.yaml").write_text(GOOD)
    (tmp_path / "space.yaml").write_text(SPACE)
    return tmp_path


def test_list_names_components_and_specs(zoo: Runner) -> None:
    ran = zoo("list")
    assert ran.code == 0 and not ran.err
    for name in ("attention", "mamba2", "gpt2", "spaces/hybrid-24"):
        assert name in ran.out
    rows = zoo("list", "mamba*", "--json").json
    assert {row["type"] for row in rows} >= {"mamba", "mamba2", "mamba-130m", "mamba2-130m"}
    assert all(row["type"].startswith("mamba") and row["summary"] for row in rows)
    assert {row["role"] for row in zoo("list", "--role", "norm", "--json").json} == {"norm"}
    assert {row["role"] for row in zoo("list", "--role", "spec", "--json").json} == {"spec"}
    assert zoo("list", "nothing*", "--json").json == []


def test_show_explains_a_component(zoo: Runner) -> None:
    ran = zoo("show", "attention")
    assert ran.code == 0 and "kv_heads" in ran.out and "source: Vaswani" in ran.out
    (facts,) = zoo("show", "attention", "--json").json
    assert facts["role"] == "mixer" and {"heads", "window"} <= {field["name"] for field in facts["fields"]}
    assert facts["traits"]["streaming"] is True
    (facts,) = zoo("show", "token", "--json").json
    assert [field["required"] for field in facts["fields"] if field["name"] == "vocab"] == [True]


def test_show_prints_a_spec_that_loads(zoo: Runner, folder: Path) -> None:
    from zoo.spec.document import load, parse

    for options in ((), ("--canonical",)):
        ran = zoo("show", "mamba2-hybrid", *options)
        text, _, figures = ran.out.rpartition("hash ")
        assert parse(text).hash == load("mamba2-hybrid").hash
        assert figures.startswith(load("mamba2-hybrid").hash)
    facts = zoo("show", folder / "good.yaml", "--json").json
    assert facts["hash"] == load(folder / "good.yaml").hash and facts["metrics"]["params"] > 0
    assert facts["canonical"]["width"] == 64


def test_show_lists_the_decisions_of_a_space(zoo: Runner, folder: Path) -> None:
    assert "a space of 2 points" in zoo("show", folder / "space.yaml").out.replace("\n", " ")
    facts = zoo("show", folder / "space.yaml", "--json").json
    assert facts["size"] == 2
    assert [decision["values"] for decision in facts["decisions"]] == [["mamba2", "attention"]]


def test_show_gives_ranges_by_their_ends(zoo: Runner, folder: Path) -> None:
    holes = "{heads: {int: [2, 8], step: 2}, window: {choice: [null, 64]}}"
    text = SPACE.replace("width: 64", "width: {int: [64, 1024], log: true}")
    text = text.replace("mamba2, attention", f"mamba2, {{type: attention, {holes[1:]}")
    (folder / "ranges.yaml").write_text(text)
    ran = zoo("show", folder / "ranges.yaml")
    assert ran.code == 0, ran
    assert "64..1024, logarithmic" in ran.out and "2..8, step 2" in ran.out and "null, 64" in ran.out
    facts = {fact.pop("name"): fact for fact in zoo("show", folder / "ranges.yaml", "--json").json["decisions"]}
    assert facts["width"] == {"kind": "int", "low": 64, "high": 1024, "step": 1, "log": True}
    assert facts["body.layers[0].mixer.attention.window"]["values"] == [None, 64]


def test_a_huge_range_is_shown_and_checked_at_once(zoo: Runner, folder: Path) -> None:
    (folder / "huge.yaml").write_text(SPACE.replace("width: 64", "width: {int: [64, 16000000], step: 64}"))
    assert "64..16000000, step 64" in zoo("show", folder / "huge.yaml").out
    assert zoo("validate", folder / "huge.yaml").code == 0
    (folder / "huge.yaml").write_text(SPACE.replace("width: 64", "width: {int: [64, 1000000000000]}"))
    ran = zoo("validate", folder / "huge.yaml")
    assert ran.code == 1 and "less than or equal to 16777216; got 1000000000000" in ran.out


def test_validate_tells_right_from_wrong(zoo: Runner, folder: Path) -> None:
    assert zoo("validate").code == 0
    ran = zoo("validate", folder)
    assert ran.code == 0 and "2 of 2 are valid" in ran.out
    assert f"{folder / 'good.yaml'}: a valid spec" in ran.out and "space.yaml: a valid space" in ran.out
    (folder / "bad.yaml").write_text(GOOD.replace("width", "widht").replace("attention", "atention"))
    ran = zoo("validate", folder)
    assert ran.code == 1 and "2 of 3 are valid" in ran.out
    assert f"{folder / 'bad.yaml'}:1:1: widht: unknown key 'widht' of model; did you mean 'width'?" in ran.out
    assert "    widht: 64\n    ^\n" in ran.out and "bad.yaml:3:25:" in ran.out
    ran = zoo("validate", folder / "bad.yaml", "gpt2", "--json")
    wrong, right = ran.json
    assert ran.code == 1 and right["problems"] == []
    assert [(problem["line"], problem["column"]) for problem in wrong["problems"]] == [(1, 1), (3, 25)]
    assert wrong["problems"][0]["path"] == "widht"


def test_validate_checks_published_figures(zoo: Runner, folder: Path) -> None:
    (folder / "good.yaml").write_text(GOOD + "published: {total_parameters: 5}\n")
    ran = zoo("validate", folder / "good.yaml")
    assert ran.code == 1 and "good.yaml:5:31: published.total_parameters: 5 are published" in ran.out


def test_validate_of_what_is_not_there(zoo: Runner, folder: Path) -> None:
    ran = zoo("validate", "gtp2")
    assert ran.code in (1, 2) and "did you mean 'gpt2'?" in ran.out + ran.err
    (missing,) = zoo("validate", folder / "nope.yaml", "--json").json
    assert missing["kind"] == "unknown"
    (folder / "empty").mkdir()
    ran = zoo("validate", folder / "empty")
    assert ran.code == 2 and "no specs in" in ran.err


def test_schema_is_json(zoo: Runner, folder: Path) -> None:
    from zoo.spec.schema import json_schema

    expected = json.loads(json.dumps(json_schema()))
    assert zoo("schema").json == expected
    out = folder / "schema.json"
    ran = zoo("schema", "--out", out)
    assert json.loads(out.read_text()) == expected and "yaml-language-server" in ran.out
    ran = zoo("schema", "--out", folder / "missing" / "schema.json")
    assert ran.code == 2 and "missing" in ran.err and "Traceback" not in ran.err


def test_cost_counts(zoo: Runner) -> None:
    ran = zoo("cost", "gpt2", "--layers")
    assert ran.code == 0 and "124,439,808" in ran.out and "body.layers.11" in ran.out
    facts = zoo("cost", "gpt2", "--batch", "2", "--seq", "8", "--dtype", "bf16", "--json").json
    assert facts["workload"] == {"batch": 2, "seq": 8, "past": 8, "dtype": "bf16", "weights": "bf16"}
    assert facts["metrics"]["params"] == 124439808 == sum(part["params"] for part in facts["parts"])
    assert facts["metrics"]["weights"] == 2 * 124439808


def test_weights_may_be_stored_in_fewer_bits(zoo: Runner) -> None:
    asked = ("cost", "llama2-7b", "--dtype", "bf16", "--json")
    plain, stored = zoo(*asked).json, zoo(*asked, "--weights", "int4").json
    before, after = plain["metrics"], stored["metrics"]
    assert after["weights"] == plain["detail"]["weights"]["int4"] < 0.27 * before["weights"]
    assert before["memory"] - after["memory"] == before["weights"] - after["weights"]
    # One step reads all weights but the table, of which it reads a row.
    saved = before["decode_traffic"] - after["decode_traffic"]
    assert saved == pytest.approx(before["weights"] - after["weights"], rel=0.03)
    assert before.keys() == after.keys()


def test_what_figures_are_made_of(zoo: Runner) -> None:
    ran = zoo("cost", "mixtral-8x7b", "--detail")
    assert ran.code == 0
    for name in ("experts", "kv_heads", "channel", "int4", "keys"):
        assert name in ran.out
    assert "experts" not in zoo("cost", "mixtral-8x7b").out


def test_the_least_time_on_a_device_that_is_not_there(zoo: Runner) -> None:
    ran = zoo("cost", "llama2-7b", "--roofline", "h100", "--dtype", "bf16")
    assert ran.code == 0 and "roofline" in ran.out and "decode" in ran.out
    asked = ("cost", "llama2-7b", "--roofline", "h100", "--dtype", "bf16", "--json")
    found = zoo(*asked).json["roofline"]
    assert 4e-3 < found["decode"]["seconds"] < 8e-3 and found["decode"]["arithmetic"] == 0
    assert sum(part["seconds"] for part in found["train"]["parts"]) == pytest.approx(found["train"]["seconds"])
    assert zoo("cost", "gpt2", "--roofline", "h10").err.startswith("error: unknown device 'h10'")
    quantised = zoo(*asked, "--weights", "int4").json["roofline"]
    assert 0.4 < quantised["decode"]["seconds"] / found["decode"]["seconds"] < 0.6
    assert quantised["train"] == found["train"], "nobody trains weights in four bits"


def test_layers_that_take_the_same_are_one_row(zoo: Runner) -> None:
    rows = zoo("cost", "llama2-7b", "--device", "h100", "--dtype", "bf16").out.split("source")[-1].splitlines()
    named = [line.split()[0] for line in rows if "roofline: " in line]
    assert named == ["stem", "body.layers.0..31", "body.final_norm", "head"] * 3
    assert "body.layers" not in zoo("cost", "llama2-7b", "--device", "h100", "--dtype", "bf16", "--no-layers").out


def test_a_device_is_answered_for_by_the_best_that_is_known_of_it(
    zoo: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = tmp_path / "mine.yaml"
    file.write_text(PROFILE.as_yaml())
    for device in ("h100", str(file)):
        found = zoo("cost", "tiny-bytes", "--device", device, "--json").json
        assert found["roofline"]["forward"]["seconds"] > 0 and not found["predicted"]
    missing = zoo("cost", "tiny-bytes", "--device", "cpu", "--threads", "2")
    assert (
        missing.code == 2 and "has no calibration in float32" in missing.err and "--measure times this" in missing.err
    )
    stopwatch = PretendedStopwatch()
    stopwatch.device = resolve_device("cpu", 1)
    made = calibrate(stopwatch, PROFILE, tmp_path / "log", seconds=40, clock=stopwatch.clock)
    made.save(calibration_path(stopwatch.device, "float32"))
    found = zoo("cost", "tiny-bytes", "--device", "cpu", "--threads", "1", "--json").json
    assert found["predicted"][0]["seconds"] > 0 and not found["roofline"]
    missing = zoo("cost", "tiny-bytes", "--predict", "--threads", "2")
    assert missing.code == 2 and "it has one for --threads 1; `zoo device calibrate --threads 2`" in missing.err
    listed, shown = zoo("device", "list").out, zoo("device", "show", "cpu", "--costs").out
    assert "yours for --threads 1" in listed and "pretended" in listed
    assert "memory, forward" in shown and "linear.flops" in shown and "standard error" in shown
    costs = zoo("device", "show", "cpu", "--costs", "--json").json["calibrations"][0]["costs"]["forward"]
    assert costs["linear.flops"][0] > costs["linear.flops"][1] >= 0
    file = str(calibration_path(stopwatch.device, "float32"))
    assert "calibrated in float32, not in bfloat16" in zoo("cost", "gpt2", "--device", file, "--dtype", "bf16").err
    calibration_path(resolve_device("cpu", 2), "float32").write_text(json.dumps(made.as_data()))
    assert "where that of cpu" in zoo("cost", "tiny-bytes", "--predict", "--threads", "2").err


def test_a_model_that_does_not_fit_says_so(zoo: Runner, tmp_path: Path) -> None:
    stopwatch = PretendedStopwatch()
    made = calibrate(stopwatch, PROFILE, tmp_path / "log", seconds=40, clock=stopwatch.clock).save(tmp_path / "x.json")
    assert "forward, decode, train: does not fit in the 10GB" in zoo("cost", "gpt3-175b", "--device", made).out
    assert "times as long as any model that was timed there" in zoo("cost", "gpt3-175b", "--device", made).out
    small = zoo("cost", "gpt2", "--device", made, "--seq", "32").out
    assert "does not fit" not in small and "as long as any model" not in small


def test_a_model_is_timed_part_by_part(zoo: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = ("cost", "tiny-bytes", "--seq", "16", "--measure", "--threads", "1", "--layers", "--json")
    times = zoo(*asked).json["measured"]
    for phase in ("forward", "decode"):
        whole, *parts = [time for time in times if time["phase"] == phase]
        assert whole["low"] <= whole["seconds"] <= whole["high"] and whole["source"] == "measured"
        assert all(part["seconds"] > 0 and part["high"] is None for part in parts) and len(parts) > 3


def test_predicted_times_say_where_they_come_from(zoo: Runner, tmp_path: Path) -> None:
    missing = zoo("cost", "tiny-bytes", "--predict", "--device", str(tmp_path / "none.json"))
    assert missing.code == 2 and missing.err.startswith("error: cannot read")
    made = tmp_path / "pretended.json"
    stopwatch = PretendedStopwatch()
    calibrate(stopwatch, PROFILE, tmp_path / "log", seconds=40, clock=stopwatch.clock).save(made)
    ran = zoo("cost", "tiny-bytes", "--predict", "--device", str(made), "--layers")
    assert ran.code == 0 and "predicted" in ran.out and "body.layers.0" in ran.out
    times = zoo("cost", "tiny-bytes", "--predict", "--device", str(made), "--json").json["predicted"]
    for phase in ("forward", "decode"):
        whole, *parts = [time for time in times if time["phase"] == phase]
        assert whole["path"] == "" and sum(part["seconds"] for part in parts) == pytest.approx(whole["seconds"])
        assert whole["low"] <= whole["seconds"]


def test_the_roofline_is_drawn_where_it_is_asked_for(zoo: Runner, tmp_path: Path) -> None:
    asked = ("cost", "tiny-bytes", "--roofline", "h100", "--dtype", "bf16")
    assert "FLOP/byte" not in zoo(*asked).out and "FLOP/byte" not in zoo(*asked, "--no-picture").out
    shown = zoo(*asked, "--picture").out
    assert "ridge 295" in shown and "tiny-bytes on NVIDIA H100 SXM, bfloat16" in shown and "A linear" in shown
    lines = zoo(*asked, "--picture", "--plain").out.split("tiny-bytes on")[-1].splitlines()
    assert "ridge 295" in "".join(lines) and all(line.isascii() and len(line) <= 80 for line in lines)
    file = tmp_path / "roofline.svg"
    assert zoo(*asked, "--svg", file, "--json").json["roofline"]["forward"]["seconds"] > 0
    plain = file.read_text()
    assert plain.startswith("<svg") and "bfloat16 989TFLOP/s" in plain
    assert zoo(*asked, "--svg", file, "--weights", "int4", "--json").json["workload"]["weights"] == "int4"
    assert file.read_text() != plain and "weights in int4" in file.read_text()


def test_the_least_time_on_a_mesh(zoo: Runner) -> None:
    asked = ("cost", "llama2-7b", "--device", "h100", "--mesh", "8", "--dtype", "bf16", "--batch", "8")
    ran = zoo(*asked)
    assert ran.code == 0 and "prefill, at least, on 8 x h100" in ran.out and "stationary 2x4" in ran.out
    found = zoo(*asked, "--json").json["mesh"]
    best = found["decode"]["layouts"][0]
    assert found["decode"]["chips"] == 8 and best["fits"] and best["weights"] == "stationary 2x4"
    assert best["seconds"] == max(best["compute"], best["weight_load"] + best["state_load"]) + best["communication"]
    halved = zoo(*asked, "--weights", "int8", "--json").json["mesh"]["decode"]["layouts"][0]["weight_load"]
    assert halved == best["weight_load"] / 2
    ran = zoo("cost", "gpt3-175b", "--device", "h100", "--mesh", "2x1", "--dtype", "bf16")
    assert "does not fit; 8 chips would do" in ran.out
    assert set(zoo("cost", "vit-b16", "--device", "a100", "--mesh", "2", "--json").json["mesh"]) == {"prefill"}


def test_a_device_is_calibrated_under_the_name_of_its_file(
    zoo: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopwatch = PretendedStopwatch()
    monkeypatch.setattr("zoo.hardware.stopwatch.DeviceStopwatch", lambda *_: stopwatch)
    monkeypatch.setattr("zoo.hardware.calibrate.calibrate", partial(calibrate, clock=stopwatch.clock))
    monkeypatch.setattr("zoo.hardware.calibrate.POOL", 40)
    file, made = tmp_path / "mine.yaml", tmp_path / "made.json"
    file.write_text(PROFILE.as_yaml())
    ran = zoo("device", "calibrate", "--seconds", "48", "--profile", file, "--out", made, "--fresh")
    assert ran.code == 0 and "memory, forward" in ran.out and "train" in ran.out and f"wrote {made}" in ran.out
    again = zoo("device", "calibrate", "--seconds", "20", "--profile", file, "--out", made, "--json").json
    assert 0 < again["phases"]["forward"]["error"] < 0.2
    assert load_predictor(made).profile.name == "pretended"
    wrong = zoo("device", "calibrate", "--profile", "h100")
    assert wrong.code == 2 and "h100 is a cuda device" in wrong.err


def test_devices_are_listed_shown_and_probed(zoo: Runner, tmp_path: Path) -> None:
    zoo.monkeypatch.setenv("COLUMNS", "80")
    listed = zoo("device", "list").out
    assert "h200" in listed and "xeon-emerald-rapids" in listed and "…" not in listed
    assert {"a100", "h200"} < {row["name"] for row in zoo("device", "list", "--json").json["devices"]}
    assert "bandwidth: 4.8TB" in zoo("device", "show", "h200").out
    assert "did you mean 'h200'" in zoo("device", "show", "h20").err
    file = tmp_path / "here.yaml"
    ran = zoo("device", "probe", "--threads", "1", "--out", str(file))
    assert ran.code == 0 and "source: probed" in ran.out
    shown = zoo("device", "show", str(file), "--json").json
    assert shown["kind"] == "cpu" and shown["peak"]["float32"] > 1e8 and 0 < shown["launch"] < 1e-2


def test_kernels_are_explained(zoo: Runner) -> None:
    ran = zoo("kernels")
    assert ran.code == 0 and "reference" in ran.out
    assert all(row["primitive"] for row in zoo("kernels", "--json").json)


def test_the_calls_of_a_model_are_explained(zoo: Runner) -> None:
    ran = zoo("kernels", "explain", "tiny-bytes", "--seq", "32")
    assert ran.code == 0 and "attention" in ran.out and "decode" in ran.out
    found = zoo("kernels", "explain", "tiny-bytes", "--seq", "32", "--device", "cuda", "--json").json
    assert {choice["phase"] for choice in found} == {"forward", "decode"} and all(choice["runs"] for choice in found)
    assert zoo("kernels", "explain", "tiny-bites").code == 2


def test_recorded_timings_are_printed_or_missed(zoo: Runner) -> None:
    ran = zoo("kernels", "bench")
    assert (ran.code == 0 and "torch" in ran.out) or (ran.code == 2 and "bench.gpu" in ran.err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "gtp2"), "did you mean 'gpt2'?"),
        (("show", "atention"), "did you mean 'attention'?"),
        (("list", "--role", "mixr"), "did you mean 'mixer'?"),
        (("list", "nothing*"), "nothing matches 'nothing*'"),
        (("cost", "gtp2"), "did you mean 'gpt2'?"),
        (("cost", "gpt2", "--dtype", "float23"), "did you mean 'float32'?"),
        (("cost", "gpt2", "--batch", "0"), "--batch"),
        (
            ("cost", "gpt2", "--svg", "x.svg"),
            "--svg is about the picture of a roofline; give --device or --roofline too",
        ),
        (("cost", "gpt2", "--roofline", "h100", "--plain", "--json"), "--plain is about the terminal"),
        (("cost", "gpt2", "--roofline", "h100", "--svg", "/nope/x.svg"), "there is no folder /nope; make it first"),
        (("cost", "gpt2", "--roofline", "h100", "--svg", "/tmp"), "cannot write /tmp: it is a folder"),
        (("device", "calibrate", "--out", "/tmp"), "cannot write /tmp: it is a folder"),
        (("device", "probe", "--out", "/nope/x.yaml"), "there is no folder /nope; make it first"),
        (("cost", "gpt2", "--device", "nonsense"), "unknown device 'nonsense'; known: "),
        (("cost", "gpt2", "--device", "h20"), "did you mean 'h200'?"),
        (("cost", "gpt2", "--device", ""), "unknown device ''"),
        (("cost", "gpt2", "--device", "h100", "--threads", "4"), "--threads is about times on this machine"),
        (("cost", "gpt2", "--threads", "1"), "--threads is about times on this machine"),
        (("cost", "gpt2", "--device", "h100", "--roofline", "h200"), "--roofline names a device itself"),
        (("cost", "gpt2", "--measure", "--weights", "int4"), "--weights int4 goes with counts"),
        (("device", "show", "nonsense"), "unknown device 'nonsense'; known: a100, cpu, cuda, epyc"),
        (("cost", "gpt2", "--weights", "int9"), "unknown dtype 'int9' of weights; did you mean 'int8'?"),
        (("cost", "gpt2", "--mesh", "8"), "--mesh needs --device: a100"),
        (("cost", "gpt2", "--mesh", "8", "--device", "h100", "--measure"), "ask for one at a time"),
        (("cost", "gpt2", "--mesh", "0", "--device", "h100"), "'0' is not a mesh"),
        (("cost", "gpt2", "--mesh", "5", "--device", "h100"), "4 or 6 chips would do"),
        (("cost", "gpt2", "--mesh", "2", "--device", "raspberry-pi-4"), "has no `link` to other chips"),
        (("cost", "spaces/hybrid-24"), "a hole, but a finished spec is needed"),
        (("show", "nowhere.yaml"), "no such file"),
        (("valdate",), "validate"),
        (("cost",), "Missing argument"),
        (("build", "gpt2", "--save", "/nope/x.safetensors"), "there is no folder /nope; make it first"),
        (
            ("search", "spaces/hybrid-24", "--timeout", "10"),
            "--timeout: '10' has no unit, expected a time such as 10min",
        ),
        (("search", "spaces/hybrid-24", "--budget", "params<=60% of gtp2"), "--budget:1:16: no spec is called 'gtp2'"),
        (("train", "gpt2", "--data", "bytes:stdlb"), "did you mean 'stdlib'?"),
    ],
)
def test_mistakes_end_with_a_message_and_code_2(zoo: Runner, arguments: tuple[str, ...], message: str) -> None:
    ran = zoo(*arguments)
    assert ran.code == 2
    assert message in ran.err and "Traceback" not in ran.err
    assert not ran.out


def test_json_has_no_decoration_and_no_wrapping(zoo: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b" not in zoo("list", "--json").out
    assert zoo("cost", "gpt2", "--json").json["spec"] == "gpt2"


def test_a_narrow_terminal_is_enough(zoo: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    for arguments in (("list",), ("show", "attention"), ("cost", "gpt2", "--layers"), ("kernels",)):
        ran = zoo(*arguments)
        assert ran.code == 0
        assert max(map(len, ran.out.splitlines())) <= 40 or arguments[0] != "list"


def test_output_that_nobody_reads_is_no_error() -> None:
    command = f"{sys.executable} -c 'from zoo.cli import main; main()' list | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "0"


def test_an_ignored_interrupt_is_heard_again(zoo: Runner) -> None:
    """Shells that run scripts start what ends in `&` with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert zoo("list", "glu").code == 0
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
