"""Which implementation runs, and what the user is told about it."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch

from zoo import kernels
from zoo.errors import ZooError
from zoo.kernels.dispatch import Call, Implementation, Primitive


def table(*refusals: str | None) -> Primitive:
    """A primitive whose implementations `0`, `1`, ... return their name, and refuse with the reasons given."""

    def implementation(name: str, reason: str | None) -> Implementation:
        return Implementation(name, lambda: name, lambda call: reason)

    return Primitive("attention", tuple(implementation(str(i), reason) for i, reason in enumerate(refusals)))


CALL = Call("cpu", torch.float32)


def test_the_first_that_serves_runs() -> None:
    assert table(None, None).select(CALL)() == "0"
    assert table("no", None, None).select(CALL)() == "1"


def test_none_serves() -> None:
    with pytest.raises(ZooError, match=r"no implementation serves this call .*0: too wide; 1: too long"):
        table("too wide", "too long").select(CALL)


def test_use_holds_in_its_block_and_thread_only() -> None:
    x = torch.randn(1, 3, 2, 4)
    with kernels.use(attention="reference"):
        inside = kernels.dispatch.chosen("attention")
        seen: list[str | None] = []
        thread = threading.Thread(target=lambda: seen.append(kernels.dispatch.chosen("attention")))
        thread.start()
        thread.join()
        with kernels.use(rotary="reference"):
            assert kernels.dispatch.chosen("attention") == "reference"
        kernels.attention(x, x, x)
    assert (inside, seen, kernels.dispatch.chosen("attention")) == ("reference", [None], None)


def test_use_runs_what_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "zoo.kernels.pointwise._RMS_NORM", Primitive("rms_norm", (_marked("torch"), _marked("reference")))
    )
    assert kernels.rms_norm(torch.ones(2)) == "torch"
    with kernels.use(rms_norm="reference"):
        assert kernels.rms_norm(torch.ones(2)) == "reference"


def _marked(name: str) -> Implementation:
    return Implementation(name, lambda *_: name)


def test_a_choice_that_cannot_serve_is_an_error() -> None:
    with (
        kernels.use(attention="reference"),
        pytest.raises(ZooError, match=r"'reference' was chosen .* cannot serve: no"),
    ):
        Primitive("attention", (_marked("torch"), Implementation("reference", print, lambda call: "no"))).select(CALL)


def test_unknown_names() -> None:
    with (
        pytest.raises(ZooError, match="no primitive is called 'atention'; did you mean 'attention'"),
        kernels.use(atention="x"),
    ):
        pass
    with pytest.raises(ZooError, match="did you mean 'reference'"), kernels.use(attention="referense"):
        pass
    with pytest.raises(ZooError, match="'float31' is no dtype"):
        kernels.explain(dtype="float31")
    with pytest.raises(ZooError, match="'abacus' is no device"):
        kernels.explain("abacus")


def test_explain_has_a_serving_row_for_every_primitive() -> None:
    rows = kernels.explain("cpu", "bfloat16")
    assert {row.primitive for row in rows} == set(kernels.dispatch.HOMES)
    assert {row.primitive for row in rows if row.serves} == set(kernels.dispatch.HOMES)
    assert all((row.primitive, "reference", None) in rows for row in rows)


def test_importing_does_not_import_torch() -> None:
    program = "import sys, zoo.kernels, zoo.kernels.work, zoo.kernels.dispatch; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_every_public_name_loads() -> None:
    for name in kernels.__all__:
        assert callable(getattr(kernels, name))
    with pytest.raises(AttributeError, match="no attribute 'softmax'"):
        _ = kernels.softmax  # type: ignore[attr-defined]
