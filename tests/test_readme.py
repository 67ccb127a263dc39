"""What the README says can be typed: its commands and flags exist, its links lead somewhere, its snippet runs."""

import re
import shlex
from pathlib import Path

import pytest

from idnerf import cli
from idnerf.evaluation.metrics import psnr

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    return [line.split("#")[0].strip() for line in README.splitlines() if line.startswith("idnerf ")]


def test_the_readme_shows_every_main_command():
    assert {shlex.split(c)[1] for c in commands()} >= {"render", "evaluate", "train", "convert"}


@pytest.mark.parametrize("line", sorted(set(commands())))
def test_commands_and_flags_exist(line, capsys):
    _, command, *rest = shlex.split(line)
    assert command in cli.COMMANDS
    preset = [rest[0]] if command == "train" else []
    with pytest.raises(SystemExit) as stop:
        cli.main([command, *preset, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for flag in re.findall(r"(?<!\S)--[a-z-]+", line):
        assert flag in text, f"{line}: no {flag}"


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_links_lead_somewhere(target):
    assert (ROOT / target).exists(), target


def first_snippet(page: str) -> str:
    """A page's first block of Python, without comments."""
    text = (ROOT / page).read_text(encoding="utf-8")
    code = re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)[0]
    return re.sub(r" *#.*", "", code)


@pytest.mark.parametrize("code", sorted({first_snippet("README.md"), first_snippet("docs/index.md")}))
def test_the_first_snippet_of_python_runs(code):
    names: dict = {}
    exec(code, names)
    width, height = names["scene"].cameras.size
    assert names["out"].rgb.shape == (3, height, width)
    assert psnr(names["out"].rgb, names["scene"].image(0)) > 15


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", README, flags=re.M):
        assert re.search(rf"^{target}:", makefile, flags=re.M)
