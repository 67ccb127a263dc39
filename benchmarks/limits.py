"""Where it fails, measured and pictured: docs/limits.md.

python benchmarks/limits.py --data DATA --out docs/limits.md           # and docs/images/limit_*.jpg, procedural only
python benchmarks/limits.py --data DATA --out FILE --quick             # fewer photos and scenes
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import torch
import tyro
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from boards import (
    BOARDS,
    Results,
    Scores,
    board_targets,
    cells_of,
    commit,
    fill,
    scene_at,
    weights_hash,
    weights_row,
)
from error_parts import BLOCK, SHIFTS, error_parts, parts_table
from fixed_scenes import FixedTask, fixed_scenes, fixed_task, kept_generator
from idnerf.allocator import keep_freed_memory
from idnerf.commands.demo import contact_sheet
from idnerf.commands.options import choose_device, load_model
from idnerf.errors import InputError
from idnerf.evaluation.evaluator import HIGHEST_PSNR, crop_window, render_inputs
from idnerf.evaluation.metrics import psnr
from idnerf.evaluation.protocols import Task, evaluation_tasks, get_protocol
from idnerf.evaluation.references import Render
from idnerf.evaluation.report import write_report
from idnerf.rendering.colormap import colorize_error
from idnerf.types import Cameras, RenderOutput, Views
from limit_scenes import FAR_PANEL, MAIN_BALL, LimitCase, World, limit_case, room, with_surface

NUM_SOURCES = 3
ALLOWED_LOSS = 1.5
"""dB that a near or far wrong by a factor of 2 may cost."""

Measure = Callable[[], Scores]


class Kept:
    """Measurements on disk by name: what is there is not measured again."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, name: str, measure: Measure) -> Scores:
        path = self.folder / f"{name}.json"
        if not path.is_file():
            write_report(path, measure())
            print(name, path.read_text().replace("\n", " "), file=sys.stderr, flush=True)
        return json.loads(path.read_text())


@dataclass(frozen=True)
class Bench:
    """What every experiment needs.

    Attributes:
        render: the model, on CPU tensors in and out.
        kept: finished measurements.
        pictures: folder of the pictures.
        stale: pictures are drawn anew, as they show other weights.
    """

    render: Render
    kept: Kept
    pictures: Path
    stale: bool


def on_device(render: Render, device: torch.device) -> Render:
    """A render function for CPU tensors."""

    def run(source: Views, target: Cameras) -> RenderOutput:
        with torch.inference_mode():
            return render(source.to(device), target.to(device)).map(lambda x: x.float().cpu())

    return run


def score(
    output: RenderOutput, truth: Float[Tensor, "3 height width"], mask: Bool[Tensor, "height width"] | None = None
) -> float:
    """PSNR in dB."""
    return min(psnr(output.rgb.clamp(0, 1), truth, mask), HIGHEST_PSNR)


# ---------------------------------------------------------------------------------------------------------------------
# Scenes made to fail


@dataclass(frozen=True)
class Failure:
    """One picture: what is special, on which pixels it shows, and the same scene without it.

    Attributes:
        surfaces: numbers of the surfaces that are special; -1 is the sky; empty is the whole image.
        degrees: angle between target and sources.
    """

    name: str
    title: str
    world: World
    surfaces: tuple[int, ...] = ()
    num_sources: int = NUM_SOURCES
    degrees: float = 6.0


FAILURES = (
    Failure("control", "nothing special", room()),
    Failure("mirror", "a mirror", with_surface(room(), FAR_PANEL, kind="mirror"), (FAR_PANEL,)),
    Failure("gloss", "a glossy ball", with_surface(room(), MAIN_BALL, kind="glossy"), (MAIN_BALL,)),
    Failure("sky", "a sky, beyond `far`", replace(room(back=False), sky=True), (-1,)),
    Failure("moving", "a ball that rolls on", with_surface(room(), MAIN_BALL, motion=(0.06, 0, 0)), (MAIN_BALL,)),
    Failure("two", "two sources", room(), num_sources=2),
    Failure("wide", "sources 30 degrees away", room(), degrees=30.0),
)

ANGLES = (3.0, 6.0, 12.0, 20.0, 30.0, 45.0)
COUNTS = (2, 3, 4, 5, 6)


def failure_scores(bench: Bench, failure: Failure) -> Scores:
    """PSNR of the special pixels, of the same pixels in the control scene, and of the rest; draws the picture."""
    picture = bench.pictures / f"limit_{failure.name}.jpg"

    def measure() -> Scores:
        case = limit_case(failure.world, failure.num_sources, failure.degrees)
        output = bench.render(case.source, case.target)
        draw(picture, case, output)
        here = case.shows(*failure.surfaces) if failure.surfaces else torch.ones_like(case.numbers, dtype=torch.bool)
        assert output.confidence is not None
        scores = {"psnr": score(output, case.image), "here": score(output, case.image, here)}
        scores["confidence_here"] = output.confidence[here].mean().item()
        scores["confidence"] = output.confidence.mean().item()
        if failure.surfaces:
            plain = limit_case(room(), failure.num_sources, failure.degrees)
            without = bench.render(plain.source, plain.target)
            scores["without"] = score(without, plain.image, here)
            scores["rest"] = score(output, case.image, ~here)
        return scores

    if bench.stale or not picture.is_file():
        (bench.kept.folder / f"scene-{failure.name}.json").unlink(missing_ok=True)
    return bench.kept(f"scene-{failure.name}", measure)


def draw(path: Path, case: LimitCase, output: RenderOutput) -> None:
    """Two sources, the rendering, the truth, the error and the confidence in one row."""
    assert output.confidence is not None
    row = {
        "source": case.source.images[0],
        "source 2": case.source.images[1],
        "rendered": output.rgb.clamp(0, 1),
        "truth": case.image,
        "error (red: 0.3)": colorize_error(output.rgb.clamp(0, 1), case.image),
        "confidence (white: 1)": output.confidence.expand(3, -1, -1),
    }
    sheet = contact_sheet([row])
    pixels = (sheet.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=85)


def room_scores(bench: Bench, num_sources: int, degrees: float) -> Scores:
    """PSNR of the plain room."""

    def measure() -> Scores:
        case = limit_case(room(), num_sources, degrees)
        return {"psnr": score(bench.render(case.source, case.target), case.image)}

    return bench.kept(f"room-n{num_sources}-{degrees:g}", measure)


# ---------------------------------------------------------------------------------------------------------------------
# Photos and procedural scenes under changed conditions


@dataclass(frozen=True)
class Photo:
    """A target of a development scene with its sources, and the window that is scored."""

    name: str
    source: Views
    target: Cameras
    image: Float[Tensor, "3 height width"]
    window: tuple[slice, slice]

    def score(self, output: RenderOutput) -> float:
        rows, columns = self.window
        return min(psnr(output.rgb.clamp(0, 1)[:, rows, columns], self.image[:, rows, columns]), HIGHEST_PSNR)


HALF = next(board for board in BOARDS if board.name == "half")


def photos(data: Path, per_scene: int | None, ranks: Sequence[int] = range(NUM_SOURCES)) -> list[Photo]:
    """Targets of flower and horns at half size; ``ranks``: which of the nearest candidates are the sources."""
    found = []
    for folder, ids in board_targets(HALF, data).items():
        scene = scene_at(data, folder).resized(HALF.size)
        protocol = get_protocol(HALF.protocol)
        for task in evaluation_tasks(scene, protocol, max(ranks) + 1, tuple(ids[:per_scene])):
            chosen = Task(task.target, tuple(task.sources[rank] for rank in ranks))
            source, target = render_inputs(scene, chosen)
            name = f"{scene.name}-{scene.view_ids[task.target]}"
            found.append(Photo(name, source, target, scene.image(task.target), crop_window(HALF.size, HALF.crops[0])))
    return found


def tasks_of(scenes: Path, limit: int | None) -> list[FixedTask]:
    """Fixed procedural scenes."""
    return [fixed_task(name, scene, NUM_SOURCES) for name, scene in fixed_scenes(scenes, limit)]


@dataclass(frozen=True)
class Range:
    """A wrong depth range: near and far times these."""

    title: str
    near: float = 1.0
    far: float = 1.0


RANGES = (
    Range("right"),
    Range("near half as far", near=0.5),
    Range("far twice as far", far=2.0),
    Range("both: too wide", near=0.5, far=2.0),
    Range("near twice as far", near=2.0),
    Range("far half as far", far=0.5),
)

SMALLEST_RANGE = 1.05
"""far / near below which a wrong range is empty, and is not tried."""


def wrong_range(target: Cameras, change: Range) -> Cameras | None:
    """The target with a wrong depth range; None where nothing would be left of it."""
    near, far = target.near * change.near, target.far * change.far
    return target.with_bounds(near, far) if float(far / near) > SMALLEST_RANGE else None


def outside(depth: Float[Tensor, "height width"], target: Cameras) -> float:
    """Share of the pixels whose surface the depth range leaves out."""
    return ((depth < target.near) | (depth > target.far)).double().mean().item()


def range_scores(bench: Bench, change: Range, items: Sequence[Photo | FixedTask], group: str) -> Scores:
    """Mean PSNR with a wrong range and with the right one, over the targets where the wrong one holds anything."""

    def one(item: Photo | FixedTask) -> Scores:
        target = wrong_range(item.target, change)
        if target is None:
            return {"psnr": None}
        output = bench.render(item.source, target)
        if isinstance(item, Photo):
            return {"psnr": item.score(output)}
        return {"psnr": score(output, item.image), "outside": outside(item.depth, target)}

    records = []
    for item in items:
        key = f"range-{group}-{item.name}-{change.near:g}-{change.far:g}"
        records.append(bench.kept(key, lambda item=item: one(item)))
    return {"psnr": [r["psnr"] for r in records], "outside": [r.get("outside") for r in records]}


def range_table(bench: Bench, items: Sequence[Photo | FixedTask], group: str) -> list[str]:
    """One line per wrong range."""
    right = range_scores(bench, RANGES[0], items, group)["psnr"]
    lines = []
    for change in RANGES:
        scores = range_scores(bench, change, items, group)
        pairs = [(a, b) for a, b in zip(right, scores["psnr"], strict=True) if b is not None]
        if not pairs:
            lines.append(f"| {group} | {change.title} | 0 | - | - | - |")
            continue
        loss = mean(a - b for a, b in pairs)
        left_out = [share for share in scores["outside"] if share is not None]
        cut = f"{100 * mean(left_out):.0f} %" if left_out else "-"
        word = "" if change == RANGES[0] else " (within 1.5 dB)" if loss < ALLOWED_LOSS else " **(over 1.5 dB)**"
        cells = [f"{len(pairs)}", f"{mean(b for _, b in pairs):.2f}", f"{loss:+.2f}{word}", cut]
        lines.append(f"| {group} | {change.title} | " + " | ".join(cells) + " |")
    return lines


GAINS = (0.5, 0.8, 1.0, 1.25, 2.0)
"""Exposure of the nearest source, as a factor on linear light."""


def exposed(image: Float[Tensor, "3 height width"], gain: float) -> Float[Tensor, "3 height width"]:
    """The photo exposed ``gain`` times as long (display gamma 2.2), clipped."""
    return (image**2.2 * gain).clamp(0, 1) ** (1 / 2.2)


def exposure_scores(bench: Bench, gain: float, items: Sequence[Photo | FixedTask], group: str) -> float:
    """Mean PSNR when the nearest source alone has another exposure."""

    def one(item: Photo | FixedTask) -> Scores:
        images = torch.cat([exposed(item.source.images[0], gain)[None], item.source.images[1:]])
        output = bench.render(Views(images, item.source.cameras), item.target)
        return {"psnr": item.score(output) if isinstance(item, Photo) else score(output, item.image)}

    records = [bench.kept(f"gain-{group}-{item.name}-{gain:g}", lambda item=item: one(item)) for item in items]
    return mean(record["psnr"] for record in records)


def baseline_of(photo: Photo) -> float:
    """Mean distance of the sources from the target, in units of near."""
    distances = (photo.source.cameras.centers - photo.target.centers).norm(dim=-1)
    return float(distances.mean() / photo.target.near)


def photo_parts(bench: Bench, items: Sequence[Photo]) -> dict[str, Scores]:
    """What the error of each photo is made of, by its name."""

    def one(item: Photo) -> Scores:
        output = bench.render(item.source, item.target)
        return error_parts(output, item.image, item.source.cameras, item.target, item.window)

    return {item.name: bench.kept(f"parts-{item.name}", lambda item=item: one(item)) for item in items}


RANKS = ((0, 1, 2), (3, 4, 5), (6, 7, 8), (10, 11, 12))
"""Which of the nearest candidates are taken as sources, for wider baselines."""


def baseline_scores(bench: Bench, data: Path, ranks: tuple[int, ...], per_scene: int | None) -> tuple[float, float]:
    """(mean baseline in units of near, mean PSNR) on flower and horns."""
    items = photos(data, per_scene, ranks)
    records = [
        bench.kept(
            f"ranks-{item.name}-{'.'.join(map(str, ranks))}",
            lambda item=item: {"psnr": item.score(bench.render(item.source, item.target))},
        )
        for item in items
    ]
    return mean(baseline_of(item) for item in items), mean(record["psnr"] for record in records)


# ---------------------------------------------------------------------------------------------------------------------
# The document

EXPLAINED = {
    "mirror": "A mirror shows a room behind the wall. Where its reflection moves as a surface at that depth would, and "
    "the depth range reaches so far, it is rendered there; a curved mirror has no such depth.",
    "gloss": "A highlight sits where the reflected light meets the eye, so it moves over the ball. Blending mixes its "
    "places.",
    "sky": "The sky lies beyond `far` and has next to nothing to match. Its depth is a guess; as it is plain, the "
    "guess is seen at the edges of what stands before it, and where clouds do not meet.",
    "moving": "The photos disagree about where the ball is. It is rendered faint, doubled or torn.",
    "two": "With two sources, every surface that one of them does not see is a guess.",
    "wide": "Far sources see surfaces at another slant and other parts of them: matching finds less, and more is "
    "hidden.",
}


def failure_table(results: dict[str, Scores]) -> list[str]:
    """One line per made scene."""
    lines = [
        "| scene | whole image | special pixels | the same pixels without it | confidence: special, whole |",
        "|---|---|---|---|---|",
    ]
    for failure in FAILURES:
        scores = results[failure.name]
        special = f"{scores['here']:.2f}" if failure.surfaces else "-"
        without = f"{scores['without']:.2f}" if "without" in scores else "-"
        trust = f"{scores['confidence']:.2f}"
        trust = f"{scores['confidence_here']:.2f}, {trust}" if failure.surfaces else trust
        lines.append(f"| {failure.title} | {scores['psnr']:.2f} | {special} | {without} | {trust} |")
    return lines


def count_lines(data: Path, results: Results, row: str, per_scene: int | None) -> dict[int, float]:
    """Mean PSNR on flower and horns by number of sources, from the scoreboard's renderings; filled by ``main``."""
    board = replace(HALF, num_sources=COUNTS)
    targets = {folder: tuple(ids[:per_scene]) for folder, ids in board_targets(board, data).items()}
    found: dict[int, list[float]] = {}
    for cell in cells_of(board, targets):
        scores = results.read(row, cell)
        if scores is not None:
            found.setdefault(cell.num_sources, []).append(scores["crops"][f"{HALF.crops[0]:g}"]["psnr"])
    return {n: mean(values) for n, values in sorted(found.items())}


def document(
    failures: dict[str, Scores],
    ranges: list[str],
    counts: dict[str, dict[int, float]],
    baselines: list[tuple[str, float, float]],
    gains: dict[str, list[float]],
    parts: dict[str, Scores],
    digest: str,
    pictures: str,
    command: str,
    extent: str,
) -> str:
    """docs/limits.md, as ``command`` wrote it; ``extent`` says how many photos and scenes were looked at."""
    lines = [
        "# Limits",
        "",
        f"Where it fails, and how much that costs. Written by `{command}`, not by hand ({extent}); weights: SHA-256 "
        f"`{digest}`, commit {commit()}. PSNR in dB, three nearest "
        "sources 6 degrees away unless said otherwise. The pictures are of one small ray-cast room "
        "(`benchmarks/limit_scenes.py`) in which one thing is changed at a time; the photos are flower and horns at "
        "480x320; *procedural* are the fixed test scenes. Rows of a picture: two sources, rendering, truth, error, "
        "confidence.",
        "",
        *failure_table(failures),
        "",
        f"![Nothing special]({pictures}/limit_control.jpg)",
    ]
    for failure in FAILURES[1:]:
        title = failure.title[0].upper() + failure.title[1:]
        lines += [
            "",
            f"## {title}",
            "",
            EXPLAINED[failure.name],
            "",
            f"![{title}]({pictures}/limit_{failure.name}.jpg)",
        ]
        if failure.name == "two":
            lines += ["", "| sources | " + " | ".join(map(str, COUNTS)) + " |", "|---" * (len(COUNTS) + 1) + "|"]
            for name, by_count in counts.items():
                cells = [f"{by_count[n]:.2f}" if n in by_count else "-" for n in COUNTS]
                lines.append(f"| {name} | " + " | ".join(cells) + " |")
        if failure.name == "wide":
            lines += ["", "| scene | sources from the target | PSNR |", "|---|---|---|"]
            for name, distance, value in baselines:
                where = f"{distance:g} degrees" if name == "room" else f"{distance:.2f} near"
                lines.append(f"| {name} | {where} | {value:.2f} |")
    lines += [
        "",
        "## Near and far guessed wrong",
        "",
        "The depth range of the target, wrong by a factor of 2. A range that is too wide costs precision; one that is "
        "too narrow leaves surfaces out, so it is widened first where enough matches lie beyond it ([the "
        "cascade](cascade.md)). Targets whose wrong range is empty (near twice as far is beyond far) are left out of "
        "that row. *Left out*: share of the pixels whose surface lies outside the wrong range as given, where exact "
        "depth tells. The aim is a loss below 1.5 dB.",
        "",
        "| scenes | range | targets | PSNR | loss | left out |",
        "|---|---|---|---|---|---|",
        *ranges,
        "",
        "## Exposure differences",
        "",
        "The nearest source alone exposed differently (factor on linear light).",
        "",
        "| scenes | " + " | ".join(f"{gain:g}" for gain in GAINS) + " |",
        "|---" * (len(GAINS) + 1) + "|",
    ]
    lines += [f"| {name} | " + " | ".join(f"{value:.2f}" for value in values) + " |" for name, values in gains.items()]
    if parts:
        lines += [
            "",
            "## What the error on photos is made of",
            "",
            "*Not framed by all sources*: pixels whose rendered surface lies outside the image of a source, hidden or "
            "not, and their share of the squared error. *Gain of moved blocks*: what the PSNR would gain if every "
            f"block of {BLOCK}x{BLOCK} pixels lay where it fits the truth best, up to {max(SHIFTS):g} pixels away on "
            "each axis. That bounds what errors of depth and of the cameras cost together; the target's own camera "
            "error, which no method can see, is in it.",
            "",
            *parts_table(parts),
        ]
    return "\n".join(lines) + "\n"


def main(
    out: Path,
    data: Path | None = None,
    weights: str = "default",
    work: Path = Path("out/scoreboard"),
    scenes: Path | None = None,
    pictures: Path | None = None,
    quick: bool = False,
    device: str = "auto",
) -> None:
    """Measure, draw the pictures, write the document.

    Args:
        out: the document.
        data: folder of the development scenes; none leaves the photos out.
        weights: `default`, a file, a run folder or a hub id.
        work: folder of finished measurements: a run goes on where the last one stopped.
        scenes: folder of the rendered procedural scenes; WORK/scenes by default.
        pictures: folder of the pictures; images beside the document by default.
        quick: one target per photo scene, 16 procedural scenes for the depth ranges and 8 for the exposures, instead of
            four, 64 and 16.
        device: auto, cpu or cuda.
    """
    keep_freed_memory()
    where, row, results = choose_device(device), weights_row(weights), Results(work)
    scenes, pictures = scenes or work / "scenes", pictures or out.parent / "images"
    folder = work / "limits" / row
    stamp = folder / "pictures.txt"
    stale = not stamp.is_file() or stamp.read_text() != str(pictures.resolve())
    model = load_model(weights, where).render
    bench = Bench(on_device(model, where), Kept(folder), pictures, stale)
    failures = {failure.name: failure_scores(bench, failure) for failure in FAILURES}
    stamp.write_text(str(pictures.resolve()))
    per_scene, few, many = (1, 8, 16) if quick else (None, 16, None)
    procedural = f"procedural ({kept_generator(scenes)})"
    tasks = tasks_of(scenes, many)
    groups: dict[str, Sequence[Photo | FixedTask]] = {procedural: tasks}
    counts = {"room": {n: room_scores(bench, n, 6.0)["psnr"] for n in COUNTS}}
    baselines = [("room", angle, room_scores(bench, NUM_SOURCES, angle)["psnr"]) for angle in ANGLES]
    if data is not None:
        groups["flower, horns"] = photos(data, per_scene)
        board = replace(HALF, num_sources=COUNTS)
        targets = {name: tuple(ids[:per_scene]) for name, ids in board_targets(board, data).items()}
        fill(cells_of(board, targets), row, lambda: model, results, data, where)
        counts["flower, horns"] = count_lines(data, results, row, per_scene)
        for ranks in RANKS:
            baselines.append(("flower, horns", *baseline_scores(bench, data, ranks, per_scene)))
    ranges = [line for name, items in groups.items() for line in range_table(bench, items, name)]
    fewer = {name: items[:few] for name, items in groups.items()}
    gains = {name: [exposure_scores(bench, gain, items, name) for gain in GAINS] for name, items in fewer.items()}
    parts = photo_parts(bench, photos(data, None)) if data is not None else {}
    relative = pictures.relative_to(out.parent).as_posix()
    command = "python benchmarks/limits.py" + " --data DATA" * (data is not None) + " --out docs/limits.md"
    extent = f"procedural: {len(tasks)} scenes, exposures {len(fewer[procedural])}"
    if data is not None:
        each = "one target each, but in the last table all" if quick else "all targets of each"
        extent = f"photos: {each}; {extent}"
    digest = weights_hash(weights)
    text = document(
        failures, ranges, counts, baselines, gains, parts, digest, relative, command + " --quick" * quick, extent
    )
    out.write_text(text, encoding="utf-8")
    print(f"{out}, {pictures}/limit_*.jpg")


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except InputError as error:
        sys.exit(f"error: {error}")
