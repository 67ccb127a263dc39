"""Development scenes and protocols of the scoreboard, and their renderings on disk: one JSON file each.

A run resumes by skipping the files that are there; the reference rows are rendered once for all weights.
"""

import datetime
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from idnerf import __version__
from idnerf.checkpoint import locate_weights
from idnerf.data.load import find_scenes, load_scene
from idnerf.data.scene import Scene
from idnerf.evaluation.evaluator import evaluate_scene
from idnerf.evaluation.protocols import evaluation_tasks, get_protocol
from idnerf.evaluation.references import Render
from idnerf.evaluation.report import write_report
from idnerf.types import Cameras, RenderOutput, Views

Scores = dict[str, Any]
"""What one rendering scored, as its JSON file holds it."""


@dataclass(frozen=True)
class Board:
    """A group of scenes under one protocol.

    Attributes:
        name: as ``--only`` takes it.
        title: heading in the document.
        scenes: folders below the data folder.
        crops: shares of the image that are scored; the first one is the board's own.
        num_sources: numbers of sources to report.
        targets: view numbers; None takes the protocol's own.
        quick: the targets that ``--quick`` takes.
        note: a line below the heading.
    """

    name: str
    title: str
    scenes: tuple[str, ...]
    protocol: str
    size: tuple[int, int]
    crops: tuple[float, ...] = (1.0,)
    num_sources: tuple[int, ...] = (2, 3, 5)
    targets: tuple[int, ...] | None = None
    quick: tuple[int, ...] | None = None
    note: str = ""


BOARDS = (
    Board(
        "half",
        "Real forward-facing photos, half size",
        ("nerf_llff_data/flower", "nerf_llff_data/horns"),
        "mvsnerf",
        (480, 320),
        (0.8,),
        note="480x320, central 80 %, the four targets and sixteen candidates of the MVSNeRF family.",
    ),
    Board(
        "full",
        "Real forward-facing photos, full size",
        ("nerf_llff_data/flower",),
        "mvsnerf",
        (960, 640),
        (0.8,),
        note="960x640, central 80 %: the published protocol. The published mean is over eight scenes; this is one.",
    ),
    Board(
        "dtu",
        "DTU scan24",
        ("DTU",),
        "mvsnerf",
        (640, 512),
        note="640x512, the whole image: no depth maps are at hand, so no foreground mask, and figures do not compare "
        "with published ones. scan24 is a training scan of other methods.",
    ),
    Board(
        "lego",
        "NeRF-Synthetic lego",
        ("nerf_synthetic/lego",),
        "mvsnerf",
        (400, 400),
        (0.8, 1.0),
        note="400x400, half its published size, on white. Both crop conventions: the central 80 % (MatchNeRF) and the "
        "whole image (ENeRF's family).",
    ),
    Board(
        "fountain",
        "Fountain-P11",
        ("strecha_fountain-P11",),
        "nearest",
        (504, 336),
        quick=(0, 3, 6, 9),
        note="504x336, whole image, every photo left out in turn. Depth ranges are inferred from the photos.",
    ),
    Board(
        "fox",
        "Fox",
        ("fox",),
        "nearest",
        (270, 480),
        targets=tuple(range(0, 50, 5)),
        quick=(0, 15, 30, 45),
        note="270x480, whole image, every fifth photo left out in turn.",
    ),
    Board(
        "printer",
        "Printer",
        ("printer",),
        "nearest",
        (640, 480),
        num_sources=(2,),
        note="640x480, whole image, each of the three photos from the other two, 16 degrees apart.",
    ),
)


def quick_boards() -> tuple[Board, ...]:
    """Everything but the full size, few targets of the long boards, three sources but on ``half``."""
    boards = []
    for board in BOARDS:
        if board.name != "full":
            counts = board.num_sources if board.name == "half" else board.num_sources[-2:-1] or board.num_sources
            boards.append(replace(board, targets=board.quick or board.targets, num_sources=counts))
    return tuple(boards)


def selection_half(targets: Sequence[int]) -> tuple[int, ...]:
    """The targets that weights are chosen by: even positions in the protocol's list."""
    return tuple(targets[::2])


def reporting_half(targets: Sequence[int]) -> tuple[int, ...]:
    """The targets that never choose: odd positions in the protocol's list."""
    return tuple(targets[1::2])


@dataclass(frozen=True)
class Cell:
    """One rendering: a target of a scene from so many sources. All its scores are kept in one JSON file."""

    board: Board
    folder: str
    num_sources: int
    target: int

    @property
    def file_name(self) -> str:
        width, height = self.board.size
        scene = self.folder.rsplit("/", 1)[-1]
        return f"{scene}-{self.board.protocol}-{width}x{height}-n{self.num_sources}-t{self.target}.json"


class Once:
    """A render function that remembers its last picture, so that two crops of it cost one rendering.

    ``seconds`` is the wall time of that rendering and ``processor_seconds`` the time all threads computed: on a machine
    that others use too, only the latter says what a rendering costs.
    """

    def __init__(self, render: Render):
        self.render = render
        self.output: RenderOutput | None = None
        self.seconds = self.processor_seconds = 0.0

    def __call__(self, source: Views, target: Cameras) -> RenderOutput:
        if self.output is None:
            wall, processor = time.perf_counter(), time.process_time()
            self.output = self.render(source, target)
            if target.device.type == "cuda":
                torch.cuda.synchronize(target.device)
            self.seconds = time.perf_counter() - wall
            self.processor_seconds = time.process_time() - processor
        return self.output


def compute_cell(cell: Cell, scene: Scene, render: Render, device: torch.device) -> Scores:
    """Render the cell's target once and score it under each of the board's crops."""
    once = Once(render)
    crops: dict[str, Scores] = {}
    sources: list[int] = []
    for crop in cell.board.crops:
        result = evaluate_scene(
            scene,
            once,
            get_protocol(cell.board.protocol),
            cell.num_sources,
            size=cell.board.size,
            crop=crop,
            targets=(cell.target,),
            references=False,
            device=device,
        )
        record = result.views[0]
        sources = record["sources"]
        crops[f"{crop:g}"] = {key: record[key] for key in ("psnr", "ssim", "ssim_range2")}
    return {
        "scene": scene.name,
        "target": cell.target,
        "sources": sources,
        "crops": crops,
        "seconds": once.seconds,
        "processor_seconds": once.processor_seconds,
        "device": device_name(device),
        "torch": torch.__version__,
        "idnerf": __version__,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def device_name(device: torch.device) -> str:
    """Such as ``CPU, 1 thread`` or the graphics card's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads > 1)}"


def commit() -> str:
    """The checkout's commit, with a plus where files under src differ from it; ``none`` outside a checkout."""
    here = Path(__file__).parent
    git = ["git", "-C", str(here)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return "none"
    changed = subprocess.run([*git, "status", "--porcelain", "../src"], capture_output=True, text=True).stdout
    return head.stdout.strip() + "+" * bool(changed.strip())


def weights_hash(weights: str) -> str:
    """First twelve digits of the SHA-256 of the weights' file."""
    return hashlib.sha256(locate_weights(weights).read_bytes()).hexdigest()[:12]


def weights_row(weights: str) -> str:
    """Name of the row of renderings with these weights."""
    return f"weights-{weights_hash(weights)}"


class Results:
    """Cells on disk, one folder per row: ``weights-HASH``, ``copy``, ``plane``, ``sweep``."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    def read(self, row: str, cell: Cell) -> Scores | None:
        path = self.folder / row / cell.file_name
        return json.loads(path.read_text()) if path.is_file() else None

    def write(self, row: str, cell: Cell, scores: Scores) -> None:
        write_report(self.folder / row / cell.file_name, scores)


Targets = dict[str, tuple[int, ...]]
"""Scene folder -> the protocol's list of targets."""


def board_targets(board: Board, data: Path) -> Targets:
    """What a board renders of each of its scenes."""
    found: Targets = {}
    for folder in board.scenes:
        scene = scene_at(data, folder)
        tasks = evaluation_tasks(scene, get_protocol(board.protocol), 2, board.targets)
        found[folder] = tuple(scene.view_ids[task.target] for task in tasks)
    return found


_SCENES: dict[Path, Scene] = {}


def scene_at(data: Path, folder: str) -> Scene:
    """The scene below ``data``, loaded once. Raises ``InputError`` when it is not there."""
    path = Path(data) / folder
    if path not in _SCENES:
        _SCENES[path] = load_scene(find_scenes(path)[0])
    return _SCENES[path]


def cells_of(board: Board, targets: Targets) -> list[Cell]:
    """All renderings of a board, those from three sources first: a run that is cut short has the headline."""
    counts = sorted(board.num_sources, key=lambda n: (n != 3, n))
    return [Cell(board, folder, n, t) for n in counts for folder, ids in targets.items() for t in ids]


def fill(
    cells: Iterable[Cell], row: str, render: Callable[[], Render], results: Results, data: Path, device: torch.device,
    *, deadline: float = float("inf"),
) -> bool:  # fmt: skip
    """Compute the cells that are missing; ``render`` is called only if there are any. False when time ran out."""
    missing = [cell for cell in cells if results.read(row, cell) is None]
    function = render() if missing else None
    for number, cell in enumerate(missing):
        if time.monotonic() > deadline:
            return False
        assert function is not None
        scores = compute_cell(cell, scene_at(data, cell.folder), function, device)
        results.write(row, cell, scores)
        first = scores["crops"][f"{cell.board.crops[0]:g}"]
        line = f"{row} {cell.file_name[:-5]}: {first['psnr']:.2f} dB, {scores['seconds']:.1f} s"
        print(f"[{number + 1}/{len(missing)}] {line}", file=sys.stderr, flush=True)
    return True
