"""What few samples cost: both qualities of the cascade beside its own rendering with 128 samples a ray.

python benchmarks/sampling.py --data DATA --work out/sampling                 # prints the table
python benchmarks/sampling.py --data DATA --work out/sampling --page docs/performance.md
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

from boards import BOARDS, Cell, Results, board_targets, cells_of, fill, weights_hash
from idnerf.allocator import keep_freed_memory
from idnerf.commands.options import choose_device, load_model
from idnerf.errors import InputError
from idnerf.evaluation.references import Render
from idnerf.models.cascade import Cascade, Quality
from idnerf.models.idnerf import IDNeRF
from pages import put_between_marks
from selection import mean_of, score_fixed_scenes

MARK = "few samples"


@dataclass(frozen=True)
class Way:
    """One way to render with the same weights."""

    name: str
    quality: Quality = "full"
    samples: int | None = None


WAYS = (
    Way("`fast`", quality="fast"),
    Way("`full`"),
    Way("16 samples a ray", samples=16),
    Way("128 samples a ray", samples=128),
)


def rendering(model: IDNeRF, way: Way) -> Render:
    """A render function of that way."""
    core = model.core
    if not isinstance(core, Cascade):
        raise InputError("--weights: expected weights of the cascade, got the paper configuration's")
    original = core.config

    def render(source, target):
        core.config = replace(original, samples=way.samples or original.samples)
        try:
            return model.render(source, target, quality=way.quality)
        finally:
            core.config = original

    return render


def measure(
    model: IDNeRF, way: Way, work: Path, data: Path, scenes: int, row: str, device: torch.device
) -> tuple[float, dict[str, float]]:
    """PSNR on the procedural scenes, and the mean over the targets of each photo scene (half size, 3 sources)."""
    render = rendering(model, way)
    procedural = mean_of(score_fixed_scenes(render, work / "scenes", scenes, device).values(), "psnr")
    board, results = BOARDS[0], Results(work)
    cells = [cell for cell in cells_of(board, board_targets(board, data)) if cell.num_sources == 3]
    fill(cells, row, lambda: render, results, data, device)
    by_scene: dict[str, list[float]] = {}
    for cell in cells:
        by_scene.setdefault(cell.folder.rsplit("/", 1)[-1], []).append(psnr_of(results, row, cell))
    return procedural, {name: sum(values) / len(values) for name, values in by_scene.items()}


def psnr_of(results: Results, row: str, cell: Cell) -> float:
    scores = results.read(row, cell)
    assert scores is not None
    return scores["crops"][f"{cell.board.crops[0]:g}"]["psnr"]


def main(
    data: Path,
    work: Path = Path("out/sampling"),
    page: Path | None = None,
    scenes: int = 16,
    weights: str = "default",
    device: str = "auto",
) -> None:
    """Print the table, and put it into ``page`` between its marks.

    Args:
        data: folder of the development scenes.
        work: keeps scenes and renderings.
        scenes: number of procedural test scenes.
    """
    keep_freed_memory()
    where = choose_device(device)
    model = load_model(weights, where)
    lines = [f"| PSNR, dB | procedural ({scenes}) | flower | horns |", "|---|---|---|---|"]
    for way in WAYS:
        row = f"{way.quality}-{way.samples or 'own'}-{weights_hash(weights)}"
        procedural, photos = measure(model, way, work, data, scenes, row, where)
        cells = [f"{value:.2f}" for value in (procedural, *photos.values())]
        lines.append(f"| {way.name} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    table = "\n".join(lines)
    print(table)
    if page is not None:
        put_between_marks(page, MARK, table)


if __name__ == "__main__":
    tyro.cli(main)
