"""Renders a scene's targets and scores them: images first, scores after, so no truth can reach a renderer."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from idnerf.data.image_io import RESIZE_FILTER, write_png
from idnerf.data.scene import Scene
from idnerf.data.seen import count_seen
from idnerf.data.view_selection import USUAL_SOURCES
from idnerf.errors import InputError
from idnerf.evaluation.lpips import Lpips
from idnerf.evaluation.metrics import SSIM_WINDOW, depth_errors, depth_median_relative_error, psnr, ssim
from idnerf.evaluation.protocols import Protocol, Split, Task, evaluation_tasks
from idnerf.evaluation.references import REFERENCES, Render
from idnerf.ranks import Ranks, interleaved
from idnerf.rendering.colormap import colorize_depth, colorize_error
from idnerf.types import Cameras, RenderOutput, Views

HIGHEST_PSNR = 100.0
"""dB reported for an error of 1e-10 and below, where PSNR runs off to infinity, which JSON cannot hold."""

GROUP = 16
"""Targets rendered before they are scored: bounds the memory that finished images take."""

ViewRecord = dict[str, Any]
"""One entry of a report's ``views``."""

Progress = Callable[[int, int], None]
"""(images done, images in all)."""


@dataclass(frozen=True)
class SceneResult:
    """Scores of one scene.

    Attributes:
        scene: its name.
        size: (width, height) evaluated at.
        crop: share of width and height that was scored.
        views: one record per target, for the render function under test.
        references: the same for each reference row; empty when they were not asked for.
        notes: what was chosen or left out.
    """

    scene: str
    size: tuple[int, int]
    crop: float
    views: list[ViewRecord]
    references: dict[str, list[ViewRecord]]
    notes: tuple[str, ...]


def evaluation_plan(
    scene: Scene,
    protocol: Protocol,
    num_sources: int | None,
    *,
    size: tuple[int, int] | None = None,
    crop: float | None = None,
    targets: tuple[int, ...] | None = None,
) -> tuple[Split, list[Task]]:
    """How ``evaluate_scene`` will score a scene, and what it will render; nothing is rendered or decoded yet.

    Raises ``InputError`` for what the protocol cannot do, and for a scored part that is too small for SSIM.
    """
    tasks = evaluation_tasks(scene, protocol, num_sources, targets)
    split = protocol.split(scene, size, crop)
    rows, columns = crop_window(split.size, split.crop)
    width, height = columns.stop - columns.start, rows.stop - rows.start
    if min(width, height) < SSIM_WINDOW:
        raise InputError(
            f"{scene.name}: SSIM needs at least {SSIM_WINDOW}x{SSIM_WINDOW} pixels, and {width}x{height} are scored: "
            "ask for a larger --size or --crop"
        )
    return split, tasks


def evaluate_scene(
    scene: Scene,
    render: Render,
    protocol: Protocol,
    num_sources: int | None,
    *,
    size: tuple[int, int] | None = None,
    crop: float | None = None,
    targets: tuple[int, ...] | None = None,
    references: bool = True,
    lpips: Lpips | None = None,
    device: torch.device | str = "cpu",
    save: Path | None = None,
    progress: Progress | None = None,
    ranks: Ranks = Ranks(),  # noqa: B008 - frozen
) -> SceneResult:
    """Render and score every target of ``scene`` under ``protocol``.

    Args:
        render: (sources [view], target []) -> RenderOutput of the target's size. It gets the target's camera
            with the sources' depth range, and never its photo.
        num_sources: sources per target; None takes the usual number, or all there are where they are fewer.
        size, crop, targets: override the protocol's own; ``targets`` are protocol ids.
        references: also score the three rows that learn nothing.
        lpips: from ``evaluation.lpips.load_lpips``; None leaves ``lpips`` null.
        device: where ``render`` expects its inputs.
        save: folder for prediction, truth, depth and error as PNG, under the scene's name.
        progress: called after every image.
        ranks: only this rank's share of the targets; ``joined_results`` puts the ranks' results together.

    ``seconds`` of a record is the wall time of one ``render`` call, encoding included.

    Raises ``InputError`` for what the protocol cannot do, for output that is not finite or of another size.
    """
    split, tasks = evaluation_plan(scene, protocol, num_sources, size=size, crop=crop, targets=targets)
    used = len(tasks[0].sources)
    fewer = num_sources is None and used < USUAL_SOURCES
    tasks, scene = tasks[ranks.rank :: ranks.world], scene.resized(split.size)
    rows: dict[str, Render] = {"": render, **(REFERENCES if references else {})}
    records: dict[str, list[ViewRecord]] = {row: [] for row in rows}
    done, unmasked = 0, False
    for start in range(0, len(tasks), GROUP):
        group = tasks[start : start + GROUP]
        rendered: dict[Task, list[tuple[str, RenderOutput, float]]] = {task: [] for task in group}
        for task in group:
            source, target = render_inputs(scene, task, device)
            what = f"{scene.name}, target {scene.view_ids[task.target]}"
            for row, function in rows.items():
                rendered[task].append((row, *_timed(function, source, target, what)))
                done += 1
                if progress is not None:
                    progress(done, len(tasks) * len(rows))
        for task in group:
            known = _known(scene, task)
            unmasked = unmasked or known.depth is None
            for row, output, seconds in rendered.pop(task):
                scores = _score(scene, split, known, output, lpips)
                records[row].append(_record(scene, task, scores, seconds))
                if save is not None:
                    _save(Path(save) / scene.name, scene, task, row, output, known.image)
    return SceneResult(
        scene.name,
        split.size,
        split.crop,
        records.pop(""),
        records,
        (
            *protocol.notes,
            *split.notes,
            *([f"{scene.name}: {used} sources, all there are beside a target"] if fewer else []),
            *_notes(scene, split, unmasked),
        ),
    )


def joined_results(parts: Sequence[SceneResult]) -> SceneResult:
    """One scene's results of all ranks, as one process would have given them."""
    return replace(
        parts[0],
        views=interleaved([part.views for part in parts]),
        references={row: interleaved([part.references[row] for part in parts]) for row in parts[0].references},
        notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
    )


def render_inputs(scene: Scene, task: Task, device: torch.device | str = "cpu") -> tuple[Views, Cameras]:
    """Source views and the target's camera, which carries the sources' depth range instead of its own."""
    source = scene.views(list(task.sources)).to(device)
    target = scene.cameras[task.target].to(device)
    return source, target.with_bounds(*Scene.target_bounds(source.cameras))


def crop_window(size: tuple[int, int], crop: float) -> tuple[slice, slice]:
    """(rows, columns) of the central ``crop`` share: 0.8 leaves out a tenth, rounded down, on each side."""
    if not 0 < crop <= 1:
        raise InputError(f"--crop is the share of the image that is scored, above 0 and at most 1, got {crop}")
    # The small term keeps 0.1 * 320 from falling to 31 in floating point.
    left, top = (math.floor(n * (1 - crop) / 2 + 1e-6) for n in size)
    return slice(top, size[1] - top), slice(left, size[0] - left)


def _timed(function: Render, source: Views, target: Cameras, what: str) -> tuple[RenderOutput, float]:
    _synchronize(target.device)
    start = time.perf_counter()
    with torch.inference_mode():
        output = function(source, target)
    _synchronize(target.device)
    seconds = time.perf_counter() - start
    if tuple(output.rgb.shape) != (3, target.height, target.width):
        raise InputError(
            f"{what}: rendering must give 3x{target.height}x{target.width} colours, got {tuple(output.rgb.shape)}"
        )
    if not output.rgb.isfinite().all() or not output.depth.isfinite().all():
        raise InputError(f"{what}: rendering gave numbers that are not finite: are the weights sound?")
    return output.map(lambda tensor: tensor.float().cpu()), seconds


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class _Truth:
    """What a target is scored against.

    Attributes:
        image: its photo.
        depth: exact depth, 0 where unknown; None where the data has none.
        unseen: pixels of known depth that fewer than two sources see; None where it cannot be told.
    """

    image: Float[Tensor, "3 height width"]
    depth: Float[Tensor, "height width"] | None
    unseen: Bool[Tensor, "height width"] | None


def _known(scene: Scene, task: Task) -> _Truth:
    depth = scene.depth(task.target)
    unseen = None
    # DTU's maps hold the scanned object alone: what they lack is unknown, not unseen.
    if depth is not None and scene.format != "dtu":
        source_depths = [scene.depth(i) for i in task.sources]
        known = [d for d in source_depths if d is not None]
        if len(known) == len(source_depths):
            source, target = scene.cameras[list(task.sources)], scene.cameras[task.target]
            unseen = (depth > 0) & (count_seen(source, torch.stack(known), target, depth) < 2)
    return _Truth(scene.image(task.target), depth, unseen)


def _score(
    scene: Scene, split: Split, known: _Truth, output: RenderOutput, lpips: Lpips | None
) -> dict[str, float | None]:
    rows, columns = crop_window(split.size, split.crop)
    prediction, truth = output.rgb.clamp(0, 1)[:, rows, columns], known.image[:, rows, columns]
    predicted_depth = output.depth[rows, columns]
    depth = None if known.depth is None else known.depth[rows, columns]
    mask = None
    if split.foreground_mask and depth is not None:
        mask = depth > 0
        prediction, truth = prediction * mask, truth * mask
    scores: dict[str, float | None] = {
        "psnr": min(psnr(prediction, truth, mask), HIGHEST_PSNR),
        "ssim": ssim(prediction, truth),
        "ssim_range2": ssim(prediction, truth, data_range=2.0),
        "lpips": None if lpips is None else lpips(prediction, truth),
    }
    if depth is None or not (depth > 0).any():
        return scores
    if scene.format == "dtu":
        if split.depth_unit_mm is not None:
            scores |= depth_errors(predicted_depth, depth, split.depth_unit_mm)
        return scores
    scores["depth_median_relative_error"] = depth_median_relative_error(predicted_depth, depth)
    unseen = None if known.unseen is None else known.unseen[rows, columns]
    if unseen is not None and unseen.any():
        scores["psnr_unseen"] = min(psnr(prediction, truth, unseen), HIGHEST_PSNR)
    return scores


def _record(scene: Scene, task: Task, scores: dict[str, float | None], seconds: float) -> ViewRecord:
    return {
        "scene": scene.name,
        "target": scene.view_ids[task.target],
        "sources": [scene.view_ids[i] for i in task.sources],
        **scores,
        "seconds": seconds,
    }


def _notes(scene: Scene, split: Split, unmasked: bool) -> list[str]:
    notes = [f"photos are resized with the {RESIZE_FILTER} filter"]
    if split.foreground_mask and unmasked:
        notes.append(f"{scene.name}: no depth maps: the whole image was scored")
    return notes


def _save(
    folder: Path,
    scene: Scene,
    task: Task,
    row: str,
    output: RenderOutput,
    truth: Float[Tensor, "3 height width"],
) -> None:
    """The model's prediction, truth, depth and error; a reference row's own picture and depth beside them."""
    stem = f"{scene.view_ids[task.target]:03d}"
    cameras = scene.cameras[list(task.sources)]
    depth = colorize_depth(output.depth, cameras.near.min().item(), cameras.far.max().item())
    if row:
        write_png(folder / f"{stem}_{row}.png", output.rgb)
        write_png(folder / f"{stem}_{row}_depth.png", depth)
        return
    write_png(folder / f"{stem}_prediction.png", output.rgb)
    write_png(folder / f"{stem}_truth.png", truth)
    write_png(folder / f"{stem}_depth.png", depth)
    write_png(folder / f"{stem}_error.png", colorize_error(output.rgb.clamp(0, 1), truth))
