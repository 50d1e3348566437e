"""Device files, and the least times that follow from them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoo.accounting import Workload, metrics
from zoo.errors import SpecError, ZooError
from zoo.hardware.predictor import PredictedLatency, load_predictor
from zoo.hardware.profile import load_profile, parse_profile, profile_names
from zoo.hardware.roofline import roofline
from zoo.hardware.store import find_predictor
from zoo.latency import Context
from zoo.spec.document import load

TEXT = """
name: mine
kind: cpu
source: probed
peak: {float32: 100GFLOP}
bandwidth: 10GB
memory: 8GB
launch: 5us
"""


@pytest.mark.parametrize("name", profile_names())
def test_shipped_devices_are_complete_and_say_where_their_figures_come_from(name: str) -> None:
    found = load_profile(name)
    assert found.name == name and found.title != name and found.sources
    assert parse_profile(found.as_yaml()) == found
    assert found.rate("bf16") >= found.rate("float32") >= 2 * found.rate("float64") > 1e9


def test_shipped_calibrations_are_those_of_shipped_devices() -> None:
    folder = Path(str(files("zoo.hardware"))) / "calibrations"
    found = [load_predictor(path) for path in sorted(folder.glob("*.json"))]
    assert "epyc-genoa" in {predictor.profile.name for predictor in found}
    for path, predictor in zip(sorted(folder.glob("*.json")), found, strict=True):
        profile = load_profile(predictor.profile.name)
        assert predictor.profile == profile and predictor.device == profile.fingerprint
        assert path.stem == f"{profile.name}-{predictor.dtype}"
        assert {"forward", "decode", "train"} == predictor.regressions.keys() == predictor.memory.keys()
        figure = PredictedLatency(predictor).latency(load("tiny-bytes"), Context(1, 256, 256, predictor.dtype))
        assert 1e-5 < figure.low < figure.seconds < figure.high < 1
        assert find_predictor(profile.name, predictor.dtype).made == predictor.made


def test_a_file_of_ones_own_is_loaded(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(TEXT)
    found = load_profile(file)
    assert (found.peak, found.bandwidth, found.launch, found.title) == ({"float32": 1e11}, 1e10, 5e-6, "mine")


def test_a_dtype_without_a_rate_takes_that_of_float32() -> None:
    found = parse_profile(TEXT)
    assert found.rate("bfloat16") == found.rate("fp16") == 1e11 and found.rate("float64") == 5e10
    with pytest.raises(ZooError, match="unknown dtype 'flot32'; did you mean 'float32'"):
        found.rate("flot32")


TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Zl", "Zp")), min_size=1)


@given(name=TEXTS, title=TEXTS, sources=st.lists(TEXTS))
def test_every_text_survives_its_file(name: str, title: str, sources: list[str]) -> None:
    found = replace(parse_profile(TEXT), name=name, title=title, sources=tuple(sources))
    assert parse_profile(found.as_yaml()) == found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("kind: cpu", "kind: cda"), "3:7: kind: expected cpu or cuda; got 'cda'"),
        (("bandwidth", "bandwith"), "6:1: bandwith: unknown key 'bandwith' of a device; did you mean 'bandwidth'?"),
        (("memory: 8GB\n", ""), "memory: required"),
        (("5us", "5"), "8:9: launch: expected a number with a unit, a time such as 15ms or 200us; got 5"),
        (("5us", "0us"), "launch: expected a number above zero"),
        (("8GB", "8ms"), "7:9: memory: "),
        (("float32", "float16"), "peak: a rate for float32 is required"),
        (("float32:", "float23:"), "peak.float23: unknown dtype 'float23'; did you mean 'float32'?"),
        (("launch:", "cache: 9GB\nlaunch:"), "8:8: cache: cache of 9GB and memory of 8GB contradict each other"),
        (("launch:", "link: 1TB\nlaunch:"), "link of 1TB and bandwidth of 10GB contradict each other"),
        (("{float32: 100GFLOP}", "100"), "peak: expected rates by dtype"),
        (("name: mine", "name: [a]"), "name: expected a text"),
        (("10GB", "10"), "6:12: bandwidth: expected a number with a unit, a size such as 512MB or 2GiB; got 10"),
        (("kind: cpu", "kind: cpu\nsources: a table"), "4:10: sources: expected a list of texts; got 'a table'"),
        (("kind: cpu", "kind: cpu\nsources: [a, 1]"), "4:14: sources.1: expected a text; got 1"),
        (("probed", "calibrated"), "source: expected published or probed; got 'calibrated'"),
    ],
)
def test_wrong_files_say_where(change: tuple[str, str], message: str) -> None:
    with pytest.raises(SpecError) as error:
        parse_profile(TEXT.replace(*change), "mine.yaml")
    assert message in str(error.value)


def test_unknown_devices_are_errors() -> None:
    with pytest.raises(ZooError, match="unknown device 'h20'; did you mean"):
        load_profile("h20")
    with pytest.raises(ZooError, match=r"nowhere\.yaml"):
        load_profile("nowhere.yaml")
    with pytest.raises(SpecError, match="expected a mapping"):
        parse_profile("[1]")


def test_a_large_product_is_bound_by_arithmetic_and_a_decoding_step_by_memory() -> None:
    spec, device = load("llama2-7b"), load_profile("h100")
    work = Workload(batch=1, seq=4096, dtype="bfloat16")
    forward, decode = (roofline(spec, work, device, phase) for phase in ("forward", "decode"))
    assert forward[1].bound == "arithmetic" and decode[1].bound == "memory"
    counted = metrics(spec, work)
    # Causal attention: 32 layers, 4,096 channels; of 8 blocks of 512 keys a query meets those up to its own.
    square = 32 * 4 * 4096 * 4096**2
    computed = counted["flops"] - square + square * sum(range(1, 9)) / 8**2
    assert sum(part.arithmetic for part in forward) == pytest.approx(computed / 989e12)
    assert sum(part.memory for part in decode) == pytest.approx(counted["decode_traffic"] / 3.35e12)
    # Every weight is read once for a token.
    assert sum(part.memory for part in decode) > counted["weights"] / 3.35e12


def test_a_tiny_model_is_bound_by_launches() -> None:
    parts = roofline(load("tiny-bytes"), Workload(seq=4), load_profile("h200"), "decode")
    assert {part.bound for part in parts} == {"launches"}
    assert all(part.seconds >= max(part.arithmetic, part.memory) for part in parts)


def test_no_torch_is_needed() -> None:
    code = (
        "import sys; from zoo.hardware.roofline import roofline; from zoo.hardware.profile import load_profile; "
        "from zoo.accounting import Workload; from zoo.spec.document import load; "
        "roofline(load('gpt2'), Workload(), load_profile('h100')); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
