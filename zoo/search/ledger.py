"""The record of a search: an Optuna study of whole trials, and who works on which candidate.

Each trial is one record, written when its candidate is done with; a candidate in hand is only claimed. So whatever
dies leaves a study from which the search goes on, and the study is an ordinary one that every Optuna tool can open.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.storages.journal import BaseJournalBackend
from optuna.trial import FrozenTrial, TrialState, create_trial

from zoo.errors import ZooError
from zoo.search.objective import Objective
from zoo.search.trial import Status, Trial

if TYPE_CHECKING:
    from zoo.search.program import Decision

JOURNAL = "study.journal"
STUDY = "zoo"
STORAGE_NOTE = "storage"
"""The file that says where a study is that is not in the folder itself."""
FORMAT = 1

_SEARCH, _RECORD, _CLAIM = "zoo", "zoo", "claim:"
_STATES: Mapping[Status, TrialState] = {
    "complete": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
    "dropped": TrialState.FAIL,
}
_CLAIM_OF_ANOTHER_HOST = 24 * 3600.0
"""Seconds after which a claim from another machine counts as given up: nobody here can see whether it lives."""


class JournalFile(BaseJournalBackend):
    """Optuna's journal, a JSON line for each record, that survives kills and full disks.

    The kernel frees the lock of a process that dies. A record that was cut short, by a kill or a full disk, is taken
    back before the next is written; anything else that is no record raises `ZooError` and leaves the file as it is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._next = (0, 0)
        """Number and offset of the record behind the last one that was read."""

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        number, offset = self._next if self._next[0] <= log_number_from else (0, 0)
        with self._opened(os.O_RDONLY) as descriptor:
            size = os.fstat(descriptor).st_size
            lines = _read(descriptor, offset, size).split(b"\n")
        # Behind the last newline stands nothing, or what a killed process left of a record.
        for line in lines[:-1]:
            if number >= log_number_from:
                yield self._record(line, number + 1)
            number, offset = number + 1, offset + len(line) + 1
            self._next = (number, offset)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        content = b"".join(json.dumps(log, separators=(",", ":")).encode() + b"\n" for log in logs)
        with self._opened(os.O_RDWR | os.O_APPEND) as descriptor:
            end = _complete_end(descriptor)
            try:
                os.ftruncate(descriptor, end)
                if os.write(descriptor, content) < len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                if not all(_is_claim(log) for log in logs):
                    os.fsync(descriptor)
            except OSError as error:
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, end)
                raise ZooError(
                    f"cannot write {self.path}: {_reason(error)}; every trial before is kept, "
                    "and the same command continues once there is room"
                ) from error

    def _record(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("op_code"), int):
            raise corrupt(self.path, f"line {number} is no record")
        return record

    @contextlib.contextmanager
    def _opened(self, flags: int) -> Iterator[int]:
        try:
            descriptor = os.open(self.path, flags | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
        except OSError as error:
            raise ZooError(f"cannot open {self.path}: {_reason(error)}") from error
        try:
            _lock(descriptor, exclusive=flags != os.O_RDONLY)
            yield descriptor
        finally:
            os.close(descriptor)


def corrupt(path: Path | str, what: str) -> ZooError:
    """The error for a study that cannot be read."""
    return ZooError(
        f"{path} is damaged: {what}. The file was left as it is; restore it, or start over with --out NEW or --fresh"
    )


class Codec:
    """How decisions are described to Optuna; a point is a trial's parameters as it is."""

    def __init__(self, decisions: Sequence[Decision]) -> None:
        self.distributions = {decision.name: _distribution(decision) for decision in decisions}

    def suggest(self, trial: optuna.Trial, name: str) -> Any:
        """The value that a trial's sampler proposes for a decision."""
        distribution = self.distributions[name]
        if isinstance(distribution, FloatDistribution):
            return trial.suggest_float(name, distribution.low, distribution.high, log=distribution.log)
        if isinstance(distribution, IntDistribution):
            low, high = distribution.low, distribution.high
            return trial.suggest_int(name, low, high, step=distribution.step, log=distribution.log)
        return trial.suggest_categorical(name, cast(CategoricalDistribution, distribution).choices)


def _distribution(decision: Decision) -> BaseDistribution:
    if decision.kind == "float":
        return FloatDistribution(decision.low, decision.high, log=decision.log)
    if decision.kind == "int":
        step = decision.step or 1
        high = decision.low + (decision.high - decision.low) // step * step
        return IntDistribution(int(decision.low), int(high), log=decision.log, step=int(step))
    return CategoricalDistribution(decision.labels)


class Ledger:
    """The study of one search, shared with whoever else works on it.

    Raises `ZooError` where the study is damaged, unreachable, or belongs to a search that differs in `identity`; the
    message says in what.
    """

    def __init__(self, study: optuna.Study, storage: optuna.storages.BaseStorage, place: str) -> None:
        self.study = study
        self.storage = storage
        self.place = place
        self._id = storage.get_study_id_from_name(study.study_name)
        self.identity: dict[str, Any] = {}
        """What makes the search this one."""
        self.about: dict[str, Any] = {}
        """Where and how it was started."""
        self.worker = _this_worker()
        self.trials: list[Trial] = []
        self.frozen: list[FrozenTrial] = []
        self.keys: set[str] = set()
        self.hashes: set[str] = set()
        self.write_seconds = 0.0

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        storage: str | None = None,
        objectives: Sequence[Objective] | None = None,
        identity: Mapping[str, Any] | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> Ledger:
        """The record in `folder`, or in an Optuna storage under the folder's name; without `identity` it must exist."""
        with quiet_optuna():
            ledger = cls(*_study(folder, storage, objectives))
        place = ledger.place
        attributes = ledger._attributes()
        if identity is not None and _SEARCH not in attributes and not ledger.storage.get_n_trials(ledger._id):
            ledger._set(_SEARCH, {"identity": dict(identity), "about": dict(about or {})})
            attributes = ledger._attributes()
        if _SEARCH not in attributes:
            raise ZooError(f"{place} holds a study that `zoo search` did not make")
        with _readable(place):
            ledger.identity, ledger.about = attributes[_SEARCH]["identity"], attributes[_SEARCH]["about"]
        if identity is not None:
            ledger._check(ledger.identity, identity)
            _note_storage(folder, storage)
        ledger.refresh()
        return ledger

    def refresh(self) -> list[Trial]:
        """Read the trials that came in since the last time, from here or elsewhere, and return them."""
        with _readable(self.place):
            found = self.storage.get_all_trials(self._id, deepcopy=False)
        fresh = found[len(self.frozen) :]
        new = [_thawed(trial, self.place) for trial in fresh]
        self.frozen += fresh
        self.trials += new
        for trial in new:
            self.keys.update((trial.key, *trial.also_seen))
            self.hashes.add(trial.spec_hash)
        return new

    def record(
        self, trial: Trial, codec: Codec, directions: int, system_attributes: Mapping[str, Any] | None = None
    ) -> None:
        """Write a trial; it is on the disk when this returns. Its number is what `refresh` then finds."""
        started = time.perf_counter()
        frozen = frozen_trial(trial, codec, directions, system_attributes)
        with _readable(self.place):
            self.study.add_trial(frozen)
        self.write_seconds += time.perf_counter() - started

    def claim(self, key: str) -> bool:
        """Say that this process works on a point; False if another that lives does already."""
        self._set(_CLAIM + self.worker, {"key": key, "time": time.time()})
        if key in self.claimed():
            self.release()
            return False
        return True

    def release(self) -> None:
        """Take back what this process claimed."""
        self._set(_CLAIM + self.worker, None)

    def others(self) -> tuple[str, ...]:
        """The other live processes that work on this search, as messages call them."""
        found = (
            name.removeprefix(_CLAIM)
            for name, claim in self._attributes().items()
            if name.startswith(_CLAIM) and claim and _alive(name.removeprefix(_CLAIM), claim["time"])
        )
        return tuple(f"process {_shown(worker)}" for worker in found if worker != self.worker)

    def claimed(self) -> dict[str, str]:
        """Points that other live processes work on, and which process."""
        found: dict[str, str] = {}
        for name, claim in self._attributes().items():
            worker = name.removeprefix(_CLAIM)
            if name.startswith(_CLAIM) and claim and worker != self.worker and _alive(worker, claim["time"]):
                found[claim["key"]] = worker
        return {key: worker for key, worker in found.items() if key not in self.keys}

    def _attributes(self) -> dict[str, Any]:
        with _readable(self.place):
            return self.storage.get_study_user_attrs(self._id)

    def _set(self, name: str, value: Any) -> None:
        started = time.perf_counter()
        with _readable(self.place):
            self.study.set_user_attr(name, value)
        self.write_seconds += time.perf_counter() - started

    def _check(self, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
        differing = [name for name in dict.fromkeys([*there, *here]) if there.get(name) != here.get(name)]
        if differing:
            lines = [f"  {name}: {_short(there.get(name))} there, {_short(here.get(name))} now" for name in differing]
            raise ZooError(
                f"{self.place} holds another search, which differs in\n"
                + "\n".join(lines)
                + "\ncontinue it with what it was started with, give another folder with --out, "
                "or replace it with --fresh"
            )


def frozen_trial(
    trial: Trial, codec: Codec, directions: int, system_attributes: Mapping[str, Any] | None = None
) -> FrozenTrial:
    """A trial as Optuna keeps it: one record that is whole."""
    values = list(trial.values) if trial.status == "complete" else None
    record = {
        "key": trial.key,
        "status": trial.status,
        "spec": trial.spec,
        "hash": trial.spec_hash,
        "shape": trial.shape,
        "metrics": trial.metrics,
        "seconds": {name: round(seconds, 6) for name, seconds in trial.seconds.items()},
    }
    if trial.slack:
        record["slack"] = {name: value for name, value in trial.slack.items() if math.isfinite(value)}
    optional = {"baseline": trial.baseline, "adjusted": trial.adjusted, "reason": trial.reason}
    record |= {name: value for name, value in optional.items() if value}
    if trial.also_seen:
        record["also_seen"] = list(trial.also_seen)
    return create_trial(
        state=_STATES[trial.status],
        values=values if directions > 1 else None,
        value=values[0] if values and directions == 1 else None,
        params=trial.point,
        distributions={name: codec.distributions[name] for name in trial.point},
        user_attrs={_RECORD: record},
        system_attrs=dict(system_attributes or {}),
        intermediate_values=trial.history,
    )


def remove(folder: Path, storage: str | None) -> None:
    """Delete the study of a folder, unless another process works on it."""
    try:
        ledger = Ledger.open(folder, storage=storage)
    except ZooError:
        ledger = None
    if ledger is not None:
        for worker in ledger.claimed().values():
            raise ZooError(f"{ledger.place} is being worked on by process {_shown(worker)}; stop that first")
        if storage is not None:
            optuna.delete_study(study_name=ledger.study.study_name, storage=ledger.storage)
    if storage is None:
        (folder / JOURNAL).unlink(missing_ok=True)


@contextlib.contextmanager
def quiet_optuna() -> Iterator[None]:
    """Keeps Optuna from writing about studies that it makes or samplers that are experimental."""
    import warnings

    logger = logging.getLogger("optuna")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        logger.setLevel(level)


def _study(
    folder: Path, storage: str | None, objectives: Sequence[Objective] | None
) -> tuple[optuna.Study, optuna.storages.BaseStorage, str]:
    """The study of a folder, made if there are objectives, the storage that holds it, and how to call that."""
    if storage is None:
        path = folder / JOURNAL
        if objectives is None and not path.exists():
            noted = _noted_storage(folder)
            if noted:
                raise ZooError(f"the study of {folder} is kept in {noted}; give it with --storage {noted}")
            raise ZooError(
                f"{folder} holds no search: there is no {JOURNAL}; a search that was given a storage is found with "
                "--storage URL"
            )
        place, name = str(path), STUDY
        if objectives is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ZooError(f"cannot make the folder {folder}: {_reason(error)}") from error
        with _readable(place):
            opened: Any = optuna.storages.JournalStorage(JournalFile(path))
    else:
        place, name = masked(storage), folder.absolute().name
        try:
            opened = optuna.storages.get_storage(storage)
        except Exception as error:  # Each kind of storage, and each driver below it, raises its own.
            raise ZooError(f"cannot open the storage {place}: {_first_line(error)}") from error
    with _readable(place):
        if name in optuna.get_all_study_names(opened):
            return optuna.load_study(study_name=name, storage=opened), opened, place
        if objectives is None:
            raise ZooError(f"{place} holds no study {name!r}")
        directions: list[Any] = [objective.direction for objective in objectives]
        # Another process may have made it since.
        study = optuna.create_study(study_name=name, storage=opened, directions=directions, load_if_exists=True)
    return study, opened, place


def _note_storage(folder: Path, storage: str | None) -> None:
    """Keep in the run's folder where its study is, without the password, for messages."""
    path = folder / STORAGE_NOTE
    try:
        if storage is None:
            path.unlink(missing_ok=True)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(masked(storage) + "\n", encoding="utf-8")
    except OSError as error:
        raise ZooError(f"cannot write {path}: {_reason(error)}") from error


def _noted_storage(folder: Path) -> str:
    """What `_note_storage` kept; empty if nothing."""
    try:
        return (folder / STORAGE_NOTE).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def masked(url: str) -> str:
    """A storage's address without its password."""
    return re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", url)


@contextlib.contextmanager
def _readable(place: str) -> Iterator[None]:
    try:
        yield
    except ZooError:
        raise
    except (KeyError, AssertionError, TypeError, AttributeError, IndexError) as error:
        found = f"{type(error).__name__}: {_first_line(error)}"
        raise corrupt(place, f"its records contradict each other ({found})") from error
    except optuna.exceptions.StorageInternalError as error:
        raise ZooError(f"the storage {place} failed: {_first_line(error)}; every trial before is kept") from error


def _thawed(frozen: FrozenTrial, place: str) -> Trial:
    record = frozen.user_attrs.get(_RECORD)
    if not isinstance(record, dict):
        raise ZooError(f"trial {frozen.number} of {place} was not written by `zoo search`")
    with _readable(place):
        return Trial(
            number=frozen.number,
            key=record["key"],
            point=frozen.params,
            status=record["status"],
            spec=record["spec"],
            spec_hash=record["hash"],
            shape=record["shape"],
            values=tuple(frozen.values or ()) if record["status"] == "complete" else (),
            metrics=record["metrics"],
            slack=record.get("slack", {}),
            baseline=record.get("baseline"),
            adjusted=record.get("adjusted", False),
            reason=record.get("reason", ""),
            also_seen=tuple(record.get("also_seen", ())),
            history=dict(frozen.intermediate_values),
            seconds=record["seconds"],
            finished=frozen.datetime_complete.isoformat(timespec="seconds") if frozen.datetime_complete else "",
        )


def _this_worker() -> str:
    return f"{socket.gethostname()}:{os.getpid()}:{_started(os.getpid())}"


def _alive(worker: str, when: float) -> bool:
    host, pid, started = worker.rsplit(":", 2)
    if host != socket.gethostname():
        return time.time() - when < _CLAIM_OF_ANOTHER_HOST
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return _started(int(pid)) == started


def _started(pid: int) -> str:
    """When a process was started, so that another with the same number is not taken for it; empty where unknown."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _shown(worker: str) -> str:
    host, pid, _ = worker.rsplit(":", 2)
    return f"{pid} on {host}"


def _is_claim(log: Mapping[str, Any]) -> bool:
    return any(name.startswith(_CLAIM) for name in log.get("user_attr", ()))


def _complete_end(descriptor: int) -> int:
    """Where the last complete line of a file ends."""
    end = os.fstat(descriptor).st_size
    while end:
        start = max(0, end - 65536)
        newline = _read(descriptor, start, end).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def _read(descriptor: int, start: int, end: int) -> bytes:
    os.lseek(descriptor, start, os.SEEK_SET)
    parts: list[bytes] = []
    while start < end and (part := os.read(descriptor, end - start)):
        parts.append(part)
        start += len(part)
    return b"".join(parts)


def _lock(descriptor: int, *, exclusive: bool) -> None:
    with contextlib.suppress(ImportError):
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)


def _reason(error: OSError) -> str:
    return "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)


def _short(value: Any) -> str:
    text = json.dumps(value, default=str) if not isinstance(value, str) else value
    return text if len(text) <= 100 else text[:97] + "..."


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
