"""Arguments by tyro, whose framed complaints become one line like every other of ours."""

import contextlib
import functools
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from idnerf.errors import InputError

HELP_INDENT = 8
"""Columns before an option's help in tyro's frames; the option itself stands further left."""

SUGGESTS = re.compile("Perhaps you meant|similar to")
"""Words that announce options of a similar name."""


def call_with(function: Callable[..., Any], arguments: Sequence[str], prog: str) -> None:
    """Parse ``arguments`` for a function and call it.

    Raises:
        InputError: an unknown or missing option, or a value that is none.
        SystemExit: for --help.
    """

    @functools.wraps(function)
    def bind(*values: Any, **named: Any) -> Callable[[], Any]:
        return functools.partial(function, *values, **named)  # called when standard error is itself again

    parse(bind, arguments, prog)()


def parse(what: Any, arguments: Sequence[str], prog: str, **options: Any) -> Any:
    """``tyro.cli``, with InputError in the place of its complaints."""
    import tyro

    if not {"-h", "--help"}.isdisjoint(arguments):
        return tyro.cli(what, args=list(arguments), prog=prog, **options)
    said = io.StringIO()
    # tyro draws its frames by the encoding of standard output: always the same ones here
    printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    try:
        with wide_terminal(), contextlib.redirect_stderr(said), contextlib.redirect_stdout(printed):
            return tyro.cli(what, args=list(arguments), prog=prog, **options)
    except SystemExit as stop:
        if not stop.code:  # a completion script was asked for
            printed.seek(0)
            print(printed.read(), end="")
            raise
        raise InputError(f"{one_line(said.getvalue())} (see `{prog} --help`)") from None


@contextlib.contextmanager
def wide_terminal() -> Iterator[None]:
    """Room for every complaint: no path in it is broken at a frame's edge."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "1000"
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def one_line(frames: str) -> str:
    """What tyro's frames say: the problem, and the names of options like the one given."""
    frames = re.sub(r"\x1b\[[0-9;]*m", "", frames)
    said = []
    for frame in frames.split("╭")[1:]:
        problem, similar = [], []
        for number, section in enumerate(re.split(r"│ ─+ │", frame)):
            if number and not SUGGESTS.search(section):
                continue
            for line in section.splitlines():
                if not line.startswith("│") or indent(line) >= HELP_INDENT:
                    continue
                text = line.strip("│ ")
                if number == 0:
                    problem.append(text)
                elif text.startswith("--"):
                    similar.append(text.split()[0].rstrip(","))
        said.append(in_our_words(" ".join(problem)) + (f"; did you mean {' or '.join(similar)}?" if similar else ""))
    return "; ".join(said) or " ".join(frames.split())


def in_our_words(problem: str) -> str:
    """Python's words for a bad number say little to who typed it."""
    for pattern, kind in (("invalid literal for int.*: ", "a whole number"), ("could not.* float: ", "a number")):
        problem = re.sub(rf"Error parsing (\S+): {pattern}", rf"expected \1 as {kind}, got ", problem)
    for name, kind in (("INT", "a whole number"), ("FLOAT", "a number")):  # of options that may be left out
        pattern = rf"Error parsing (\S+): no type matching {{None}}\|{name} .* from \[(.*?)\]\. Got errors: .*"
        problem = re.sub(pattern, rf"expected \1 as {kind}, got \2", problem)
    return problem.rstrip(".")


def indent(line: str) -> int:
    """Columns between a frame's edge and the text."""
    inside = line[1:]
    return len(inside) - len(inside.lstrip())
