"""What a user's mistake looks like: every error that the package raises on purpose derives from `ZooError`.

A `Problem` is one thing that is wrong with a document: where, what was found, what was expected and the nearest thing
that would work. A `SpecError` carries all problems of a document at once. The command line prints these without a
traceback; anything else that escapes is a defect of the package.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from unicodedata import combining, east_asian_width

MAX_SHOWN = 50


class ZooError(Exception):
    """A mistake in what the user gave; the message says what was given and what would work."""

    exit_code: int = 2


class InfeasibleError(ZooError):
    """A budget that nothing in a space meets; the message says what the space can reach."""

    exit_code = 3


class OutOfMemoryError(ZooError):
    """What was asked for does not fit into the memory of the device; the message says what needs less."""


@contextmanager
def memory_explained(what: str, advice: str) -> Iterator[None]:
    """Turns the ways in which Python, the CPU and CUDA run out of memory into an `OutOfMemoryError`.

    `what` was being done; `advice` says what needs less.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        signs = ("out of memory", "not enough memory", "DefaultCPUAllocator")
        if not isinstance(error, MemoryError) and not any(sign in text for sign in signs):
            raise
        asked = re.search(r"[Tt]ried to allocate ([0-9.]+ ?[A-Za-z]+)", text)
        size = f": {asked[1]} were asked for at once" if asked else ""
        raise OutOfMemoryError(f"out of memory while {what}{size}. {advice}") from error


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in a text: `line` and `column` count from one; `text` is the whole line."""

    file: str
    line: int
    column: int
    text: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: the path of the value inside the document, a message, and where it was written."""

    path: str
    message: str
    mark: Mark | None = None

    def __str__(self) -> str:
        place = ": ".join(part for part in (str(self.mark) if self.mark else "", self.path) if part)
        headline = f"{place}: {self.message}" if place else self.message
        if self.mark is None or not self.mark.text:
            return headline
        line, column = _excerpt(self.mark.text, self.mark.column)
        return f"{headline}\n    {line}\n    {' ' * _cells(line[: column - 1])}^"


class SpecError(ZooError):
    """A document that is not a valid spec or space, with every problem that was found in it, in the order of its lines.

    A problem that one place causes several times, as a repeated layer does, is there once. The message shows the first
    `MAX_SHOWN`.
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        once = {(problem.mark or problem.path, problem.message): problem for problem in reversed([*problems])}
        found = [*reversed(once.values())]
        files = {problem.mark.file: None for problem in found if problem.mark is not None}
        order = {file: index for index, file in enumerate(files)}

        def place(problem: Problem) -> tuple[int, int, int]:
            mark = problem.mark
            return (-1, 0, 0) if mark is None else (order[mark.file], mark.line, mark.column)

        self.problems: tuple[Problem, ...] = tuple(sorted(found, key=place))
        shown = [str(problem) for problem in self.problems[:MAX_SHOWN]]
        more = len(self.problems) - len(shown)
        super().__init__("\n".join([*shown, f"... and {more} more"] if more else shown))


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, or None if none is close.

    Similarity is that of `difflib.SequenceMatcher` on lower-case names, at least 0.6.
    """
    by_lower = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[close[0]] if close else None


def nearest_file(name: str, known: Iterable[str]) -> str | None:
    """The file whose name without its ending is most like that of `name`, at least 0.75; None if none is that close.

    Files can be called anything, so that a likeness which would do among known words is chance among them.
    """
    by_stem = {_stem(candidate): candidate for candidate in sorted(known, reverse=True)}
    close = difflib.get_close_matches(_stem(name), by_stem, n=1, cutoff=0.75)
    return by_stem[close[0]] if close else None


def _stem(name: str) -> str:
    """A file's name without the ending, in lower case."""
    head, dot, tail = name.lower().rpartition(".")
    return head if dot and head and "/" not in tail else name.lower()


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The tail of an error about an unknown name: `; did you mean 'x'?`, else the list of what is known."""
    names: Sequence[str] = sorted(known)
    best = nearest(name, names)
    if best is not None:
        return f"; did you mean {best!r}?"
    return f"; known: {', '.join(names)}" if names else ""


def _cells(text: str) -> int:
    """How many columns of a terminal a text takes: Chinese characters take two, combining accents none."""
    return sum(0 if combining(char) else 2 if east_asian_width(char) in "WF" else 1 for char in text)


def _excerpt(text: str, column: int, width: int = 120) -> tuple[str, int]:
    """The part of a line around `column` that fits a terminal, with tabs as single blanks, and the column in it."""
    text = text.replace("\t", " ")
    if len(text) <= width:
        return text, column
    start = max(0, min(column - 1 - width // 2, len(text) - width))
    return text[start : start + width], column - start
