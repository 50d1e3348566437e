from __future__ import annotations

import errno
import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages.journal import JournalFileBackend

from zoo.errors import ZooError
from zoo.search.ledger import JOURNAL, STORAGE_NOTE, Codec, JournalFile, Ledger, _note_storage, remove
from zoo.search.objective import parse_objectives
from zoo.search.program import Decision
from zoo.search.trial import Trial

LOSS = parse_objectives("loss")
CODEC = Codec(
    [
        Decision("mixer", "choice", labels=("attention", None, True, 2, 2.5)),
        Decision("depth", "int", low=2, high=9, step=3),
        Decision("rate", "float", low=0.5, high=2.0),
    ]
)


def trial(number: int, mixer: Any = "attention", **changes: Any) -> Trial:
    made = Trial(
        number=number,
        key=f"key{number}",
        point={"mixer": mixer, "depth": 5, "rate": 0.75},
        status="complete",
        spec={"width": 8},
        spec_hash=f"hash{number}",
        shape={"width": 8, "layers": []},
        values=(1.0 + number,),
        metrics={"params": 10, "loss": 1.0 + number},
        slack={"params<=20": 0.5},
        history={1: 3.0, 2: 2.0},
        seconds={"train": 0.5},
    )
    return replace(made, **changes)


def open_ledger(folder: Path, **identity: Any) -> Ledger:
    return Ledger.open(folder, objectives=LOSS, identity={"seed": 0, **identity}, about={"command": "x"})


def write(ledger: Ledger, *trials: Trial) -> None:
    for each in trials:
        ledger.record(each, CODEC, 1)
    ledger.refresh()


def test_trials_come_back_as_they_were_written(tmp_path: Path) -> None:
    written = [
        trial(0),
        trial(1, None, baseline="attention", adjusted=True, also_seen=("other",)),
        trial(2, True),
        trial(3, 2),
        trial(4, 2.5, status="pruned", values=(), reason="worse"),
        trial(5, status="dropped", values=(), history={}, reason="measured 3ms"),
        trial(6, status="failed", values=(), reason="not finite"),
    ]
    write(open_ledger(tmp_path), *written)
    again = open_ledger(tmp_path)
    found = [replace(each, finished="") for each in again.trials]
    assert found == written
    assert [type(each.point["mixer"]) for each in found] == [type(each.point["mixer"]) for each in written]
    assert again.keys == {*(each.key for each in written), "other"}
    assert again.about == {"command": "x"}


def test_the_study_is_an_ordinary_one(tmp_path: Path) -> None:
    write(open_ledger(tmp_path), trial(0), trial(1), trial(2, status="failed", values=()))
    backend = JournalFileBackend(str(tmp_path / JOURNAL))
    study = optuna.load_study(study_name=None, storage=optuna.storages.JournalStorage(backend))
    assert study.best_value == 1.0 and len(study.trials) == 3
    assert study.trials[0].params == {"mixer": "attention", "depth": 5, "rate": 0.75}
    assert study.trials[0].intermediate_values == {1: 3.0, 2: 2.0}


def test_a_storage_url_holds_the_study_under_the_name_of_the_folder(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    ledger = Ledger.open(tmp_path / "first", storage=url, objectives=LOSS, identity={"seed": 1})
    write(ledger, trial(0))
    other = Ledger.open(tmp_path / "second", storage=url, objectives=LOSS, identity={"seed": 2})
    assert other.trials == []
    assert [each.key for each in Ledger.open(tmp_path / "first", storage=url).trials] == ["key0"]
    remove(tmp_path / "first", url)
    with pytest.raises(ZooError, match="no study 'first'"):
        Ledger.open(tmp_path / "first", storage=url)
    with pytest.raises(ZooError, match=r"cannot open the storage nosuch://u:\*\*\*@host"):
        Ledger.open(tmp_path, storage="nosuch://u:secret@host/x", objectives=LOSS, identity={})


def test_another_search_in_the_same_folder_is_refused_with_what_differs(tmp_path: Path) -> None:
    open_ledger(tmp_path, budget="params<=2M", data="a")
    with pytest.raises(ZooError, match=r"(?s)budget: params<=2M there, params<=3M now.*--out.*--fresh") as error:
        open_ledger(tmp_path, budget="params<=3M", data="a")
    assert "data" not in str(error.value).replace("--data", "")


def test_a_folder_without_a_search_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="holds no search"):
        Ledger.open(tmp_path / "nothing")


@pytest.mark.parametrize("cut", [1, 20, 300])
def test_a_record_that_was_cut_short_is_forgotten(tmp_path: Path, cut: int) -> None:
    write(open_ledger(tmp_path), trial(0), trial(1))
    path = tmp_path / JOURNAL
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    ledger = open_ledger(tmp_path)
    assert [each.key for each in ledger.trials] == ["key0"]
    write(ledger, trial(2))
    assert [each.key for each in open_ledger(tmp_path).trials] == ["key0", "key2"]
    assert all(json.loads(line) for line in path.read_text().splitlines())


@pytest.mark.parametrize("garbage", [b"garbage\n", b"\x00\xff\xfe\n", b"[1, 2]\n", b'{"op_code": 99}\n', b"a\rb\n"])
@pytest.mark.parametrize("place", [0, 2, -1])
def test_garbage_in_the_journal_is_an_error_and_stays(tmp_path: Path, garbage: bytes, place: int) -> None:
    write(open_ledger(tmp_path), trial(0), trial(1))
    path = tmp_path / JOURNAL
    lines = path.read_bytes().splitlines(keepends=True)
    lines.insert(place if place >= 0 else len(lines), garbage)
    damaged = b"".join(lines)
    path.write_bytes(damaged)
    with pytest.raises(ZooError, match=r"study.journal is damaged: .*left as it is"):
        open_ledger(tmp_path)
    assert path.read_bytes() == damaged


def test_a_full_disk_loses_nothing_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = open_ledger(tmp_path)
    write(ledger, trial(0))
    path = tmp_path / JOURNAL
    before = path.read_bytes()
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, content: real(descriptor, content[:50]))
    with pytest.raises(ZooError, match="the disk is full; every trial before is kept"):
        ledger.record(trial(1), CODEC, 1)
    assert path.read_bytes() == before

    def refuse(descriptor: int) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "write", real)
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(ZooError, match="the disk is full"):
        ledger.record(trial(1), CODEC, 1)
    monkeypatch.undo()
    assert path.read_bytes() == before
    write(ledger, trial(2))
    assert [each.key for each in open_ledger(tmp_path).trials] == ["key0", "key2"]


def test_two_writers_see_each_others_trials(tmp_path: Path) -> None:
    first, second = open_ledger(tmp_path), open_ledger(tmp_path)
    write(first, trial(0))
    assert [each.key for each in second.refresh()] == ["key0"]
    write(second, trial(1))
    assert [each.key for each in first.refresh()] == ["key1"]
    assert first.refresh() == []


def test_a_claim_keeps_others_away_until_it_is_given_up_or_its_holder_is_dead(tmp_path: Path) -> None:
    first, second = open_ledger(tmp_path), open_ledger(tmp_path)
    child = os.fork()
    if child == 0:
        signal.pause()
    host, pid, started = first.worker.rsplit(":", 2)
    assert pid == str(os.getpid()) and started
    started_of_child = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[19]
    first.worker = f"{host}:{child}:{started_of_child}"
    try:
        assert first.claim("a")
        assert second.claimed() == {"a": first.worker}
        assert second.others() == (f"process {child} on {host}",) and first.others() == ()
        assert not second.claim("a")
        assert second.claim("b")
        with pytest.raises(ZooError, match=f"process {child} on"):
            remove(tmp_path, None)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert second.claimed() == {} and second.others() == ()
    assert second.claim("a")
    second.release()
    second.worker = f"elsewhere:{os.getpid()}:0"
    assert second.claim("c")
    assert set(first.claimed()) == {"c"}
    second.release()
    assert first.claimed() == {}


def test_a_process_that_took_over_a_dead_ones_number_is_not_taken_for_it(tmp_path: Path) -> None:
    first, second = open_ledger(tmp_path), open_ledger(tmp_path)
    first.worker = first.worker.rsplit(":", 1)[0] + ":1"
    first.claim("a")
    assert second.claimed() == {}


def test_a_journal_reads_on_from_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal = JournalFile(path)
    journal.append_logs([{"op_code": number} for number in range(5)])
    assert [log["op_code"] for log in journal.read_logs(2)] == [2, 3, 4]
    assert list(journal.read_logs(5)) == []
    JournalFile(path).append_logs([{"op_code": 5}])
    assert [log["op_code"] for log in journal.read_logs(5)] == [5]
    assert [log["op_code"] for log in journal.read_logs(0)] == [0, 1, 2, 3, 4, 5]


def test_a_folder_remembers_the_storage_without_its_password(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    Ledger.open(tmp_path / "run", storage=url, objectives=LOSS, identity={"seed": 1})
    with pytest.raises(ZooError, match=rf"is kept in {re.escape(url)}; give it with --storage"):
        Ledger.open(tmp_path / "run")
    (tmp_path / "run" / STORAGE_NOTE).unlink()
    with pytest.raises(ZooError, match="given a storage is found with --storage URL"):
        Ledger.open(tmp_path / "run")
    _note_storage(tmp_path / "run", "postgresql://me:secret@host/x")
    assert "secret" not in (tmp_path / "run" / STORAGE_NOTE).read_text()
    open_ledger(tmp_path / "run")
    assert not (tmp_path / "run" / STORAGE_NOTE).exists()
