"""Choosing between weights: the fixed procedural scenes and the selection half of the development targets."""

import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean

import torch

from boards import (
    BOARDS,
    Cell,
    Results,
    Scores,
    board_targets,
    cells_of,
    fill,
    selection_half,
    weights_hash,
    weights_row,
)
from fixed_scenes import fixed_scenes, fixed_task, kept_generator
from idnerf.commands.options import load_model
from idnerf.evaluation.evaluator import HIGHEST_PSNR
from idnerf.evaluation.metrics import depth_median_relative_error, psnr, ssim
from idnerf.evaluation.references import Render
from idnerf.evaluation.report import write_report

QUICK_SCENES = 16
"""Procedural scenes of a quick selection: two of each rig at each difficulty."""

NUM_SOURCES = 3

FEWEST_PIXELS = 100
"""Pixels that fewer than two sources see are scored in scenes that have at least so many of them."""


def score_fixed_scenes(
    render: Render, folder: Path, limit: int | None, device: torch.device | str = "cpu"
) -> dict[str, Scores]:
    """Scores of the procedural test scenes by name: PSNR, SSIM, PSNR by how many sources see a pixel, depth.

    ``depth`` is the median relative error where two sources see a surface within near and far: elsewhere, before plain
    backdrops and skies, depth cannot be known. ``unseen`` is the share of pixels that fewer than two sources see.
    """
    scores: dict[str, Scores] = {}
    for name, scene in fixed_scenes(folder, limit):
        task = fixed_task(name, scene, NUM_SOURCES)
        with torch.inference_mode():
            output = render(task.source.to(device), task.target.to(device)).map(lambda x: x.float().cpu())
        rgb = output.rgb.clamp(0, 1)
        shared = task.seen >= 2
        known = task.depth * (shared & (task.depth >= task.target.near) & (task.depth <= task.target.far))
        scored = {"psnr_seen": shared, "psnr_unseen": ~shared}
        scores[name] = {
            "psnr": min(psnr(rgb, task.image), HIGHEST_PSNR),
            "ssim": ssim(rgb, task.image),
            **{
                key: min(psnr(rgb, task.image, mask), HIGHEST_PSNR) if int(mask.sum()) >= FEWEST_PIXELS else None
                for key, mask in scored.items()
            },
            "unseen": (~shared).double().mean().item(),
            "depth": depth_median_relative_error(output.depth, known) if known.any() else None,
        }
    return scores


def mean_of(scores: Iterable[Scores], key: str) -> float:
    """Mean over the scenes that have the key; nan of none."""
    values = [entry[key] for entry in scores if entry[key] is not None]
    return mean(values) if values else float("nan")


def procedural_line(scores: dict[str, Scores]) -> str:
    """All scenes in one line: whole image, pixels that two or more sources see, the others, depth."""
    entries = scores.values()
    return (
        f"procedural({len(scores)}) {mean_of(entries, 'psnr'):.2f} {mean_of(entries, 'ssim'):.4f}"
        f" | seen>=2 {mean_of(entries, 'psnr_seen'):.2f}, <2 {mean_of(entries, 'psnr_unseen'):.2f}"
        f" | depth {100 * mean_of(entries, 'depth'):.2f} %"
    )


def by_kind(scores: dict[str, Scores]) -> list[str]:
    """A table by rig and difficulty, names being such as ``forward-easy-3``."""
    kinds = list(dict.fromkeys(name.rsplit("-", 1)[0] for name in scores))
    lines = [
        "| rig, difficulty | scenes | PSNR | SSIM | seen >= 2 | seen < 2 | unseen % | depth % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind in sorted(kinds):
        group = [entry for name, entry in scores.items() if name.rsplit("-", 1)[0] == kind]
        psnrs = {key: f"{mean_of(group, key):.2f}" for key in ("psnr", "psnr_seen", "psnr_unseen")}
        shares = [f"{100 * mean_of(group, key):.2f}" for key in ("unseen", "depth")]
        cells = [psnrs["psnr"], f"{mean_of(group, 'ssim'):.3f}", psnrs["psnr_seen"], psnrs["psnr_unseen"], *shares]
        lines.append(f"| {kind} | {len(group)} | " + " | ".join(cells) + " |")
    return lines


def select(
    data: Path,
    files: Sequence[str],
    results: Results,
    scenes: Path,
    device: torch.device,
    *,
    quick: bool,
    details: bool,
) -> None:
    """Print one line per file of weights; what a file scored is kept, so that it is not rendered twice.

    Args:
        scenes: folder of the rendered procedural scenes.
        quick: 16 scenes, flower and horns from three sources; else 64, every board, 2 and 5 sources too.
        details: also a table by rig and difficulty.
    """
    limit = QUICK_SCENES if quick else None
    for weights in files:
        start, row, loaded = time.process_time(), weights_row(weights), {}

        def render(weights: str = weights, loaded: dict[str, Render] = loaded) -> Render:
            if not loaded:
                loaded["render"] = load_model(weights, device).render
            return loaded["render"]

        path = results.folder / row / f"procedural-{kept_generator(scenes)}-{limit or 'all'}.json"
        if path.is_file():
            scores = json.loads(path.read_text())
        else:
            scores = score_fixed_scenes(render(), scenes, limit, device)
            write_report(path, scores)
        parts = [procedural_line(scores)]
        for board in BOARDS:
            if quick and board.name != "half":
                continue
            targets = {folder: selection_half(ids) for folder, ids in board_targets(board, data).items()}
            counts = (NUM_SOURCES,) if quick or board.name == "full" else board.num_sources
            cells = [cell for cell in cells_of(board, targets) if cell.num_sources in counts]
            fill(cells, row, render, results, data, device)
            parts += board_parts(cells, row, results)
        seconds = time.process_time() - start
        print(f"{weights} {weights_hash(weights)} | " + " | ".join(parts) + f" | {seconds:.0f} CPU s", flush=True)
        if details:
            print("\n".join(by_kind(scores)), flush=True)


def board_parts(cells: Sequence[Cell], row: str, results: Results) -> list[str]:
    """Such as ``half n3: flower 24.93, horns 24.20, mean 24.57 .8571``, one entry per number of sources."""
    parts = []
    for n in dict.fromkeys(cell.num_sources for cell in cells):
        by_scene: dict[str, list[Scores]] = {}
        for cell in cells:
            scores = results.read(row, cell)
            if cell.num_sources == n and scores is not None:
                main = scores["crops"][f"{cell.board.crops[0]:g}"]
                by_scene.setdefault(cell.folder.rsplit("/", 1)[-1], []).append(main)
        words = [f"{scene} {mean_of(group, 'psnr'):.2f}" for scene, group in by_scene.items()]
        everything = [entry for group in by_scene.values() for entry in group]
        words.append(f"mean {mean_of(everything, 'psnr'):.2f} {mean_of(everything, 'ssim'):.4f}")
        parts.append(f"{cells[0].board.name} n{n}: " + ", ".join(words))
    return parts
