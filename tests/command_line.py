"""Runs `idnerf ...` in this process, as the console script does."""

import sys

import pytest

from idnerf import cli


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of ``idnerf ARGUMENTS``."""
    before, sys.argv = sys.argv, ["idnerf", *map(str, arguments)]
    try:
        cli.entry_point()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.argv = before
    captured = capsys.readouterr()
    return code, captured.out, captured.err
