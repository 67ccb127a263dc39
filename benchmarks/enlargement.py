"""What enlarging the source photos before they are encoded gains: the same weights with and without it.

python benchmarks/enlargement.py --data DATA --work out/scoreboard --page docs/cascade.md

Photos: the half of every board's targets that weights are chosen by, at most --targets of each scene, three sources
(printer: two). Procedural scenes: two of each rig at each difficulty.
"""

import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean

import tyro

from boards import BOARDS, Board, Cell, Results, board_targets, fill, selection_half, weights_hash
from idnerf.allocator import keep_freed_memory
from idnerf.commands.options import choose_device, load_model
from idnerf.errors import InputError
from idnerf.evaluation.references import Render
from idnerf.models.enlargement import ENLARGEMENT, enlarged
from idnerf.models.idnerf import IDNeRF
from idnerf.types import Cameras, RenderOutput, Views
from pages import put_between_marks
from sampling import psnr_of
from selection import QUICK_SCENES, mean_of, score_fixed_scenes

MARK = "enlargement"
WAYS = {"as they are": False, "enlarged": True}


def rendering(model: IDNeRF, enlarge: bool) -> Render:
    """A render function that enlarges all photos, or none."""

    def render(source: Views, target: Cameras) -> RenderOutput:
        views = enlarged(source[None]) if enlarge else source[None]
        features = replace(model.core.encode(views), enlargement=ENLARGEMENT if enlarge else 1)
        return model.render_target(features, target[None]).map(lambda x: x[0])

    return render


def chosen_cells(board: Board, data: Path, most: int) -> list[Cell]:
    """Renderings of a board's selection half from three sources, or as many as it has."""
    count = 3 if 3 in board.num_sources else board.num_sources[0]
    targets = board_targets(board, data)
    return [Cell(board, folder, count, t) for folder, ids in targets.items() for t in selection_half(ids)[:most]]


def main(
    data: Path,
    weights: str = "default",
    work: Path = Path("out/scoreboard"),
    page: Path | None = None,
    only: tuple[str, ...] = (),
    targets: int = 2,
    scenes: int = QUICK_SCENES,
    device: str = "auto",
) -> None:
    """Print the table.

    Args:
        data: folder of the development scenes.
        weights: `default`, a file, a run folder or a hub id.
        work: folder of finished renderings: a run goes on where the last one stopped.
        page: put the table between its `enlargement` marks there.
        only: boards to render; all by default.
        targets: at most so many of each photo scene.
        scenes: procedural scenes.
        device: auto, cpu or cuda.
    """
    keep_freed_memory()
    where, results = choose_device(device), Results(work)
    model = load_model(weights, where)
    if model.config.configuration != "cascade":
        raise InputError("--weights: expected weights of the cascade, got the paper configuration's")
    lines = ["| PSNR, dB | size | views | " + " | ".join(WAYS) + " |", "|---" * (3 + len(WAYS)) + "|"]
    renders = {name: rendering(model, enlarge) for name, enlarge in WAYS.items()}
    if scenes:
        row = [
            mean_of(score_fixed_scenes(r, work / "scenes", scenes, where).values(), "psnr") for r in renders.values()
        ]
        lines.append(f"| procedural | 288x208 | {scenes} | " + " | ".join(f"{x:.2f}" for x in row) + " |")
    for board in BOARDS:
        if only and board.name not in only:
            continue
        cells = chosen_cells(board, data, targets)
        for name, render in renders.items():
            fill(cells, row_name(weights, name), lambda render=render: render, results, data, where)
        for folder in board.scenes:
            own = [cell for cell in cells if cell.folder == folder]
            figures = [mean(psnr_of(results, row_name(weights, name), cell) for cell in own) for name in WAYS]
            size = f"{board.size[0]}x{board.size[1]}"
            cut = " | ".join(f"{x:.2f}" for x in figures)
            lines.append(f"| {folder.rsplit('/', 1)[-1]} | {size} | {len(own)} | {cut} |")
    text = "\n".join(lines)
    print(text)
    if page is not None:
        put_between_marks(page, MARK, text)


def row_name(weights: str, way: str) -> str:
    """Folder of a row's renderings."""
    return f"{weights_hash(weights)}-{way.replace(' ', '-')}"


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except InputError as error:
        sys.exit(f"error: {error}")
