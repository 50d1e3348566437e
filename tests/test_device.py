from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from zoo import device as module
from zoo.device import Device, device_name, fingerprint, resolve_device
from zoo.errors import ZooError


def test_this_machine() -> None:
    device = fingerprint()
    assert device == resolve_device("cpu")
    assert device.kind == device.name == "cpu"
    assert device.processor
    assert 1 <= device.cores <= (os.cpu_count() or 1)
    assert device.memory is None or device.memory > 2**26
    assert device.python == platform.python_version()
    assert device.torch.startswith("2.")
    assert device.processor in str(device)


def test_the_id_changes_with_what_changes_timings() -> None:
    device = Device("cuda:0", "cuda", "H100", 132, 4, 80 * 2**30, "2.13.0", "3.11.7")
    assert device.id == "506f25eef8ef", "a new id forgets every cached timing: change it on purpose only"
    assert replace(device, name="cuda:1").id == device.id
    assert replace(device, memory=80 * 2**30 + 4096).id == device.id
    for change in ({"processor": "A100"}, {"threads": 2}, {"torch": "2.14.0"}, {"python": "3.12.0"}, {"memory": None}):
        assert replace(device, **change).id != device.id


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cpuu", "unknown device 'cpuu'; did you mean 'cpu'?"),
        ("gpu", "did you mean 'cuda'?"),
        ("gpu:1", "did you mean 'cuda:1'?"),
        ("cdua:1", "did you mean 'cuda:1'?"),
        ("cuda:x", "did you mean 'cuda'?"),
        ("tpu-v5", "known: cpu, cuda, cuda:N"),
        ("", "known: cpu"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    for refuse in (device_name, resolve_device):
        with pytest.raises(ZooError) as caught:
            refuse(name)
        assert message in str(caught.value)


def test_known_names_need_not_be_here() -> None:
    assert [device_name(name) for name in ("cpu", "cuda", "cuda:7")] == ["cpu", "cuda", "cuda:7"]


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert fingerprint().threads == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "2,4")
    assert fingerprint().threads == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert fingerprint().threads == fingerprint().cores
    assert resolve_device("cpu", threads=5).threads == 5
    with pytest.raises(ZooError, match="at least one thread"):
        resolve_device("cpu", threads=0)


@pytest.mark.parametrize(
    ("text", "processor"),
    [
        ("processor\t: 0\ncpu family\t: 6\nmodel\t\t: 207\nmodel name\t: Xeon\n", "Xeon (cpu family 6, model 207)"),
        ("processor\t: 0\nmodel name\t: Rockchip\n", "Rockchip"),
        ("CPU implementer\t: 0x41\nCPU part\t: 0xd0c\n", "aarch64 0x41 0xd0c"),
        ("", "Apple M3"),
        (None, "Apple M3"),
    ],
)
def test_processors(text: str | None, processor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cpuinfo"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(module, "_CPUINFO", file)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(module, "_sysctl", {"machdep.cpu.brand_string": "Apple M3"}.get)
    assert fingerprint().processor == processor


def test_a_mac_without_sysctl_still_has_a_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CPUINFO", tmp_path / "none")
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "processor", lambda: "arm")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert fingerprint().processor == "arm"


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(ZooError, match=r"no device 'cuda': the installed torch .* is built without CUDA; use 'cpu'"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ZooError, match="no usable GPU"):
        resolve_device("cuda:0")


def test_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    properties = SimpleNamespace(name="H100", multi_processor_count=132, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    device = resolve_device("cuda", threads=4)
    assert (device.name, device.kind, device.processor, device.cores) == ("cuda:1", "cuda", "H100", 132)
    assert device.torch.endswith("CUDA 13.0")
    assert resolve_device("cuda:0", threads=4).id == device.id
    with pytest.raises(ZooError, match="no device 'cuda:2': this machine has cuda:0 to cuda:1"):
        resolve_device("cuda:2")


def test_the_processor_is_known_without_torch() -> None:
    code = "import sys, zoo.device, zoo.latency; zoo.device.fingerprint(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
