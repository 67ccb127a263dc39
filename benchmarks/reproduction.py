"""docs/reproduction.md: what papers report, what was measured here, what was not, each in a place of its own.

python benchmarks/reproduction.py     # a second, measures nothing: after every benchmarks/scoreboard.py

Measured figures are read off the scoreboard, published ones are those of ``published_figures``: none is typed here.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import tyro

from idnerf.errors import InputError
from published_figures import PUBLISHED


@dataclass(frozen=True)
class Row:
    """A row of a scoreboard table."""

    heading: str
    sources: int
    scene: str
    views: int
    psnr: str
    ssim: str
    ssim_range2: str


DIFFERS = {
    "Real forward-facing photos, half size": (
        "480x320, central 80 %",
        "half the published size, two of its eight scenes",
    ),
    "Real forward-facing photos, full size": (
        "960x640, central 80 %",
        "the protocol itself, on one of its eight scenes",
    ),
    "DTU scan24": ("640x512, whole image", "no foreground mask, one scan, and that a training scan"),
    "NeRF-Synthetic lego": ("400x400, central 80 %", "half the published size, one of its eight scenes"),
    "Fountain-P11": ("504x336, whole image", "no published protocol"),
    "Fox": ("270x480, whole image", "no published protocol"),
    "Printer": ("640x480, whole image", "no published protocol"),
}
"""Heading of the scoreboard: what is scored there, and why it does not compare with a published table."""


def read_scoreboard(text: str) -> list[Row]:
    """Rows of the result tables, the first of each section.

    Raises:
        InputError: a section that ``DIFFERS`` does not know, or none at all.
    """
    rows = []
    for section in re.split(r"^## ", text, flags=re.M)[1:]:
        heading = section.splitlines()[0].strip()
        table = re.search(r"^\| sources \| scene .*\n\|[-|]+\n((?:\|.*\n?)+)", section, flags=re.M)
        if table is None:
            continue
        if heading not in DIFFERS:
            raise InputError(f"the scoreboard has a new section {heading!r}: say in DIFFERS how it compares")
        for line in table[1].splitlines():
            cells = [cell.strip().strip("*") for cell in line.strip("|").split("|")]
            rows.append(Row(heading, int(cells[0]), cells[1], int(cells[2]), *cells[3:6]))
    if not rows:
        raise InputError("the scoreboard has no tables of results: write it with benchmarks/scoreboard.py")
    return rows


def measured_table(rows: list[Row]) -> list[str]:
    lines = [
        "| scene | scored | sources | views | PSNR | SSIM | SSIM (range 2) | against the published protocol |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row.scene == "mean":
            continue
        scored, differs = DIFFERS[row.heading]
        lines.append(
            f"| {row.scene} | {scored} | {row.sources} | {row.views} | {row.psnr} | {row.ssim} | {row.ssim_range2} | "
            f"{differs} |"
        )
    return lines


def page(scoreboard: str) -> str:
    weights = re.search(r"SHA-256 `(\w+)`", scoreboard)
    if weights is None:
        raise InputError("the scoreboard names no weights: write it with benchmarks/scoreboard.py")
    matchnerf = next(row for row in PUBLISHED if row[0] == "MatchNeRF")
    others = [row for row in PUBLISHED if row[0] != "MatchNeRF"]
    data = ("DTU, 16 test scans", "real forward-facing, 8 scenes", "NeRF-Synthetic, 8 scenes")
    lacking = ("the test scans", "six of the eight scenes", "seven of the eight scenes")
    return "\n".join(
        [
            "# Reproduction",
            "",
            "Which published results this project stands on, which of them were measured again, and which were not. "
            "Written by `python benchmarks/reproduction.py`, which takes measured figures from the "
            "[scoreboard](scoreboard.md) and published ones from the papers named; no figure of one kind stands in a "
            "column of the other.",
            "",
            "## Published",
            "",
            "PSNR / SSIM of data range 2 / LPIPS, three nearest views, trained on DTU, at the published sizes. **None "
            "of these was measured here.** A dash: no source at hand to quote from.",
            "",
            "| result | published | source | why not measured here | the way |",
            "|---|---|---|---|---|",
            *(
                f"| MatchNeRF, {name} | {figures} | {matchnerf[1]}; README of donydchen/matchnerf | not at hand: its "
                f"weights; {why} | [training on DTU](dtu.md), step 6 |"
                for name, figures, why in zip(data, matchnerf[2:], lacking, strict=True)
            ),
            "| ID-NeRF, all of its tables | no public copy of its table was found | arXiv 2402.01217 | weights "
            "were never published; training needs DTU and a graphics card | [training on DTU](dtu.md), `idnerf-dtu` |",
            "",
            "For orientation, other networks under the same protocol, quoted alike:",
            "",
            f"| method | source | {' | '.join(data)} |",
            "|---|---|---|---|---|",
            *(f"| {' | '.join(row)} |" for row in others),
            "",
            "## Measured here",
            "",
            "### The code, against the published code",
            "",
            "With the same weights (random ones, under the published names), `paper` with `published_behaviour` gives "
            "the pixels of the published MatchNeRF code within 1e-4: [MatchNeRF](matchnerf.md) has the differences, "
            "`tests/test_matchnerf_golden.py` keeps them. Where the public ID-NeRF code does something else than its "
            "paper says, this project follows the paper: [the method](method.md) lists each case.",
            "",
            "### The default weights",
            "",
            f"Configuration `cascade`, trained here on procedural scenes only, weights SHA-256 `{weights[1]}`. The "
            "last column says why a row does not compare with the published means above.",
            "",
            *measured_table(read_scoreboard(scoreboard)),
            "",
            "The same rows beside three ways that learn nothing, with times: [scoreboard](scoreboard.md).",
            "",
            "## Not measured",
            "",
            "| what | for want of |",
            "|---|---|",
            "| a full training of `matchnerf-dtu` or `idnerf-dtu`, and its scores | DTU, a graphics card |",
            "| the published MatchNeRF weights, on any protocol | the file; random ones of its names were converted |",
            "| DTU's 16 test scans with foreground mask; its depth errors | the scans, the depth maps |",
            "| real forward-facing at 960x640 over eight scenes | six scenes; horns at full size |",
            "| NeRF-Synthetic at 800x800 over eight scenes | seven scenes; lego at full size |",
            "| Tanks and Temples (Train, Truck) | the scenes |",
            "| LPIPS, anywhere | its backbone's weights |",
            "| what guidance by Stable Diffusion gains | its weights, a graphics card |",
            "",
            "Each has its command: `idnerf evaluate ROOT --protocol mvsnerf` for the protocols "
            "([evaluation](evaluation.md)), `idnerf train matchnerf-dtu` and `idnerf-dtu` for the trainings "
            "([training on DTU](dtu.md)), `pip install '.[metrics]'` in a checkout for LPIPS, "
            "`benchmarks/ablation.py` for guidance.",
            "",
        ]
    )


def main(scoreboard: Path = Path("docs/scoreboard.md"), out: Path = Path("docs/reproduction.md")) -> None:
    """Write the page.

    Args:
        scoreboard: as benchmarks/scoreboard.py wrote it.
        out: the page.
    """
    out.write_text(page(scoreboard.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{out}: written from {scoreboard}")


if __name__ == "__main__":
    tyro.cli(main)
