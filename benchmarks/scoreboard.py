"""The scoreboard: weights beside rows that learn nothing, on the development scenes under their protocols.

python benchmarks/scoreboard.py --data DATA --out docs/scoreboard.md           # long on a CPU; resumes where it stopped
python benchmarks/scoreboard.py --data DATA --out FILE --quick --minutes 10     # some of it, for at most so long
python benchmarks/scoreboard.py --data DATA --select A.safetensors B.safetensors --quick    # choose between weights

Choosing reads the fixed procedural scenes and the even half of the development targets; the odd half is for reporting.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Annotated, Literal

import tyro

from boards import (
    BOARDS,
    Board,
    Results,
    Scores,
    Targets,
    board_targets,
    cells_of,
    fill,
    quick_boards,
    reporting_half,
    selection_half,
    weights_hash,
    weights_row,
)
from idnerf.allocator import keep_freed_memory
from idnerf.commands.options import choose_device, load_model
from idnerf.errors import InputError
from idnerf.evaluation.references import REFERENCES
from published_figures import published_section
from selection import select

Rows = dict[str, dict[tuple[str, int, int], Scores]]
"""Row ("weights", "copy", ...) -> (folder, sources, target) -> scores."""

ROWS = ("copy", "plane", "sweep")
"""The reference rows, in the order of the tables."""


def collect(board: Board, targets: Targets, row: str, results: Results) -> dict[tuple[str, int, int], Scores]:
    """(folder, sources, target) -> the cells that are there."""
    found = {}
    for cell in cells_of(board, targets):
        scores = results.read(row, cell)
        if scores is not None:
            found[cell.folder, cell.num_sources, cell.target] = scores
    return found


def average(cells: Sequence[Scores], crop: float) -> Scores | None:
    """Means over renderings; None of none."""
    if not cells:
        return None
    picked = [cell["crops"][f"{crop:g}"] for cell in cells]
    means = {key: mean(scores[key] for scores in picked) for key in ("psnr", "ssim", "ssim_range2")}
    return {**means, "count": len(cells), **{k: mean(c[k] for c in cells) for k in ("seconds", "processor_seconds")}}


def quality(scores: Scores | None) -> str:
    """``24.64 / 0.857``, or a dash."""
    return "-" if scores is None else f"{scores['psnr']:.2f} / {scores['ssim']:.3f}"


def board_table(board: Board, crop: float, targets: Targets, rows: Rows) -> list[str]:
    """Scenes and their mean by number of sources; ``rows``: "weights" and the reference rows, from ``collect``."""
    lines = [
        "| sources | scene | views | PSNR | SSIM | SSIM (range 2) | s | CPU s | nearest | best plane | plane sweep |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for n in board.num_sources:
        groups = {folder.rsplit("/", 1)[-1]: [folder] for folder in targets}
        if len(groups) > 1:
            groups["**mean**"] = list(targets)
        for name, folders in groups.items():
            keys = [(folder, n, t) for folder in folders for t in targets[folder]]
            # Where a run was cut short, all columns stand for the same views.
            keys = [key for key in keys if key in rows["weights"]]
            ours = average([rows["weights"][key] for key in keys], crop)
            if ours is None:
                continue
            cells = [f"{n}", name, f"{ours['count']}", f"**{ours['psnr']:.2f}**", f"{ours['ssim']:.3f}"]
            cells += [f"{ours['ssim_range2']:.3f}", f"{ours['seconds']:.1f}", f"{ours['processor_seconds']:.1f}"]
            for row in ROWS:
                there = [rows[row][key] for key in keys if key in rows[row]]
                cells.append(quality(average(there, crop) if len(there) == len(keys) else None))
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def halves_table(boards: Sequence[tuple[Board, Targets, Rows]]) -> list[str]:
    """PSNR of the selection half and of the reporting half of every scene."""
    lines = ["| scene | sources | selection half | reporting half |", "|---|---|---|---|"]
    for board, targets, rows in boards:
        n = 3 if 3 in board.num_sources else board.num_sources[0]
        for folder, ids in targets.items():
            cells = []
            for half in (selection_half(ids), reporting_half(ids)):
                there = [rows["weights"][folder, n, t] for t in half if (folder, n, t) in rows["weights"]]
                cells.append(quality(average(there, board.crops[0])) + f" ({len(there)})")
            size = "x".join(map(str, board.size))
            lines.append(f"| {folder.rsplit('/', 1)[-1]} {size} | {n} | " + " | ".join(cells) + " |")
    return lines


AIMS = (
    ("flower and horns, half size, 3 sources: PSNR", "25.2, then 26.0, then 26.8 dB"),
    ("the same: SSIM (range 1)", "above 0.84, then 0.88"),
    ("2 sources: PSNR below that of 3 by", "at most 1.5 dB"),
    ("5 sources: PSNR above that of 3 by", "more than 0 dB"),
)
"""What the project aims at on the half-size board."""


def aims_table(board: Board, targets: Targets, rows: Rows) -> list[str]:
    """The aims beside what was measured; two numbers of sources are compared on the targets that both have."""
    ours = rows["weights"]
    keys = [(folder, t) for folder, ids in targets.items() for t in ids]

    def psnrs(n: int, other: int) -> list[float]:
        both = [(f, t) for f, t in keys if (f, n, t) in ours and (f, other, t) in ours]
        return [ours[f, n, t]["crops"][f"{board.crops[0]:g}"]["psnr"] for f, t in both]

    three = average([ours[f, 3, t] for f, t in keys if (f, 3, t) in ours], board.crops[0])
    measured = [f"{three['psnr']:.2f} dB" if three else "-", f"{three['ssim']:.3f}" if three else "-"]
    for better, worse in ((3, 2), (5, 3)):
        a, b = psnrs(better, worse), psnrs(worse, better)
        measured.append(f"{mean(a) - mean(b):+.2f} dB ({len(a)} views)" if a else "-")
    lines = ["| | aim | measured |", "|---|---|---|"]
    return lines + [f"| {what} | {aim} | {got} |" for (what, aim), got in zip(AIMS, measured, strict=True)]


def document(boards: Sequence[tuple[Board, Targets, Rows]], weights: str, digest: str, missing: int, total: int) -> str:
    """docs/scoreboard.md."""
    cells = [scores for _, _, rows in boards for scores in rows["weights"].values()]

    def said(key: str) -> str:
        return ", ".join(sorted({str(cell[key]) for cell in cells})) or "-"

    name = weights if weights == "default" else Path(weights).name
    lines = [
        "# Scoreboard",
        "",
        "Written by `python benchmarks/scoreboard.py --data DATA --out docs/scoreboard.md`; not edited by hand.",
        "",
        f"* weights: `{name}`, SHA-256 `{digest}`; trained on procedural scenes only, no photo",
        f"* idnerf {said('idnerf')} at commit {said('commit')}, torch {said('torch')}",
        f"* rendered on {said('device')}, {said('date')}",
        "* sources: the nearest candidates by L1 distance of camera centres; near and far of a target are the nearest "
        "near and farthest far of its sources (its own are not read); photos resized by Lanczos",
        "* PSNR in dB and SSIM are means over views. SSIM has data range 1 unless it says range 2, which is what the "
        "MVSNeRF line reports ([evaluation](evaluation.md)). LPIPS was not measured",
        "* `s`: wall time of one view, encoding the sources included, beside whatever else the machine did; `CPU s`: "
        "processor time of the same. References: PSNR / SSIM of three rows that learn nothing",
    ]
    if missing:
        lines.append(f"* **incomplete**: {missing} of {total} renderings are still missing; the same command goes on")
    for board, targets, rows in boards:
        if board.name == "half":
            lines += ["", "## Aims", "", *aims_table(board, targets, rows)]
    for board, targets, rows in boards:
        lines += ["", f"## {board.title}", "", board.note]
        for crop in board.crops:
            if len(board.crops) > 1:
                lines += ["", f"Scored: {'the whole image' if crop == 1 else f'the central {crop:.0%}'}."]
            lines += ["", *board_table(board, crop, targets, rows)]
    lines += [
        "",
        "## Choosing and reporting are apart",
        "",
        "Weights are chosen by the 64 fixed procedural test scenes and by the targets at even positions of each list "
        "above (`--select`). The targets at odd positions choose nothing. PSNR / SSIM (views), main crop:",
        "",
        *halves_table(boards),
        "",
        *published_section(),
    ]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------------------------------


def main(
    data: Path,
    out: Path | None = None,
    weights: str = "default",
    work: Path = Path("out/scoreboard"),
    only: tuple[str, ...] = (),
    quick: bool = False,
    minutes: float = float("inf"),
    rows: tuple[Literal["weights", "copy", "plane", "sweep"], ...] = ("weights", *ROWS),
    select_from: Annotated[tuple[str, ...], tyro.conf.arg(name="select")] = (),
    details: bool = False,
    scenes: Path | None = None,
    device: str = "auto",
) -> None:
    """Write the scoreboard, or (--select) print one line per file of weights.

    Args:
        data: folder of the development scenes.
        out: the document to write.
        weights: `default`, a file, a run folder or a hub id.
        work: folder of finished renderings: a run goes on where the last one stopped.
        only: boards to render (half full dtu lego fountain fox printer); all by default.
        quick: fewer targets, three sources but on `half`, nothing at full size; with --select 16 procedural scenes,
            flower and horns.
        minutes: begin no rendering after so long, and write what is there.
        rows: what to render now; the document shows whatever is there.
        select_from: files of weights to choose between, instead of writing a document.
        details: with --select also a table by rig and difficulty.
        scenes: folder of the rendered procedural scenes; WORK/scenes by default.
        device: auto, cpu or cuda.
    """
    keep_freed_memory()
    results, where = Results(work), choose_device(device)
    if select_from:
        select(data, select_from, results, scenes or work / "scenes", where, quick=quick, details=details)
        return
    if out is None:
        raise InputError("expected --out FILE for the document, or --select FILES to choose between weights")
    names = [board.name for board in BOARDS]
    if unknown := [name for name in only if name not in names]:
        raise InputError(f"--only: unknown board {unknown[0]!r}, choose among {' '.join(names)}")
    boards = [board for board in (quick_boards() if quick else BOARDS) if not only or board.name in only]
    targets = {board.name: board_targets(board, data) for board in boards}
    deadline = time.monotonic() + 60 * minutes
    row_names = {"weights": weights_row(weights), **{row: row for row in ROWS}}
    for row in rows:
        for board in boards:
            fill(
                cells_of(board, targets[board.name]),
                row_names[row],
                lambda row=row: REFERENCES[row] if row in REFERENCES else load_model(weights, where).render,
                results,
                data,
                where,
                deadline=deadline,
            )
    parts, missing, total = [], 0, 0
    for board in boards:
        found = {row: collect(board, targets[board.name], name, results) for row, name in row_names.items()}
        wanted = len(row_names) * len(cells_of(board, targets[board.name]))
        total, missing = total + wanted, missing + wanted - sum(map(len, found.values()))
        parts.append((board, targets[board.name], found))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(document(parts, weights, weights_hash(weights), missing, total), encoding="utf-8")
    print(f"{out}: {total - missing} of {total} renderings")


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except InputError as error:
        sys.exit(f"error: {error}")
