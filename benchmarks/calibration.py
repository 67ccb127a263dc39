"""Does confidence predict error? Measured on the procedural test scenes and the development scenes.

python benchmarks/calibration.py --data DATA --out docs/confidence.md          # and docs/images/confidence.svg
python benchmarks/calibration.py --out docs/confidence.md --quick              # 16 procedural scenes, few photos
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from jaxtyping import Bool, Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from boards import board_targets, quick_boards, scene_at, weights_hash, weights_row
from fixed_scenes import fixed_scenes, fixed_task, kept_generator
from idnerf.allocator import keep_freed_memory
from idnerf.commands.options import choose_device, load_model
from idnerf.errors import InputError
from idnerf.evaluation.calibration import (
    STEPS,
    area_above_oracle,
    confidence_bins,
    expected_calibration_error,
    ranks,
    sparsification,
    spearman,
)
from idnerf.evaluation.evaluator import render_inputs
from idnerf.evaluation.protocols import evaluation_tasks, get_protocol
from idnerf.evaluation.references import Render
from idnerf.types import RenderOutput

NUM_SOURCES = 3

QUICK_SCENES = 16

COMMAND = "python benchmarks/calibration.py --data DATA --out docs/confidence.md"
"""What the page says it was written by, with ``--quick`` and without data as they were given."""

STRIDE = 2
"""Every so many pixels along both axes are kept: neighbours say the same."""

BOARD_NAMES = ("half", "fountain", "fox", "dtu", "lego")
"""Development scenes that are looked at."""

TITLES = {
    "procedural": "procedural test scenes",
    "half": "flower, horns",
    "fountain": "fountain",
    "fox": "fox",
    "dtu": "scan24",
    "lego": "lego",
}


@dataclass(frozen=True)
class Pixels:
    """Pixels of several renderings.

    Attributes:
        error: mean absolute colour error over the channels.
        seen: sources that see the surface; None where no exact depth tells.
        views: renderings.
    """

    confidence: Float[Tensor, "pixel"]
    error: Float[Tensor, "pixel"]
    seen: Float[Tensor, "pixel"] | None
    views: int

    @property
    def hidden(self) -> Bool[Tensor, "pixel"] | None:
        """Fewer than two sources see the pixel's surface."""
        return None if self.seen is None else self.seen < 2


def pixels_of(
    output: RenderOutput, truth: Float[Tensor, "3 height width"], seen: Float[Tensor, "height width"] | None = None
) -> dict[str, Tensor]:
    """Confidence, error and visibility of every ``STRIDE``-th pixel, flat."""
    if output.confidence is None:
        raise InputError("these weights give no confidence: choose weights of the cascade configuration")
    error = (output.rgb.clamp(0, 1) - truth).abs().mean(0)
    maps = {"confidence": output.confidence, "error": error} | ({} if seen is None else {"seen": seen})
    return {name: values[::STRIDE, ::STRIDE].reshape(-1).contiguous() for name, values in maps.items()}


def gather(files: list[Path]) -> Pixels:
    """The pixels of several files of one group."""
    parts = [load_file(path) for path in files]
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return Pixels(joined["confidence"], joined["error"], joined.get("seen"), len(files))


def render_procedural(
    render: Render, scenes: Path, limit: int | None, folder: Path, device: torch.device
) -> list[Path]:
    """Render what is missing of the fixed scenes; one file per scene."""
    files = []
    for name, scene in fixed_scenes(scenes, limit):
        path = folder / f"procedural-{kept_generator(scenes)}-{name}.safetensors"
        if not path.is_file():
            task = fixed_task(name, scene, NUM_SOURCES)
            with torch.inference_mode():
                output = render(task.source.to(device), task.target.to(device)).map(lambda x: x.float().cpu())
            save_file(pixels_of(output, task.image, task.seen), path)
        files.append(path)
    return files


def render_photos(
    render: Render, data: Path, folder: Path, device: torch.device, deadline: float
) -> dict[str, list[Path]]:
    """Render what is missing of the development scenes' targets; board -> one file per target."""
    files: dict[str, list[Path]] = {}
    for board in quick_boards():
        if board.name not in BOARD_NAMES:
            continue
        for scene_folder, targets in board_targets(board, data).items():
            scene = scene_at(data, scene_folder).resized(board.size)
            protocol = get_protocol(board.protocol)
            for task in evaluation_tasks(scene, protocol, NUM_SOURCES, targets):
                path = folder / f"{board.name}-{scene.name}-{scene.view_ids[task.target]}.safetensors"
                if not path.is_file():
                    if time.monotonic() > deadline:
                        continue
                    source, target = render_inputs(scene, task, device)
                    with torch.inference_mode():
                        output = render(source, target).map(lambda x: x.float().cpu())
                    save_file(pixels_of(output, scene.image(task.target)), path)
                files.setdefault(board.name, []).append(path)
    return files


def verdict(correlation: float, share: float) -> str:
    """One word for a table."""
    if correlation < -0.4 and share < 0.5:
        return "yes"
    return "weakly" if correlation < -0.2 and share < 0.8 else "no"


def summary_table(groups: dict[str, Pixels]) -> list[str]:
    """One line per group of scenes."""
    lines = [
        "| scenes | views | mean error | Spearman | AUSE | of random | calibration error | predicts error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, pixels in groups.items():
        correlation = spearman(pixels.confidence, pixels.error)
        area, share = area_above_oracle(pixels.error, pixels.confidence)
        off = expected_calibration_error(confidence_bins(pixels.confidence, pixels.error))
        cells = [f"{pixels.error.mean():.4f}", f"{correlation:+.2f}", f"{area:.3f}", f"{share:.2f}", f"{off:.3f}"]
        cells.append(verdict(correlation, share))
        lines.append(f"| {TITLES[name]} | {pixels.views} | " + " | ".join(cells) + " |")
    return lines


def bins_table(pixels: Pixels) -> list[str]:
    """Deciles of confidence."""
    lines = [
        "| decile | confidence | mean error | share with error < 0.1 | share that fewer than two sources see |",
        "|---|---|---|---|---|",
    ]
    for number, part in enumerate(confidence_bins(pixels.confidence, pixels.error, pixels.hidden), start=1):
        hidden = "-" if part.hidden is None else f"{100 * part.hidden:.1f} %"
        cells = [f"{part.confidence:.3f}", f"{part.error:.4f}", f"{100 * part.within:.1f} %", hidden]
        lines.append(f"| {number} | " + " | ".join(cells) + " |")
    return lines


def seen_table(pixels: Pixels) -> list[str]:
    """Confidence and error by how many sources see a pixel."""
    assert pixels.seen is not None
    lines = [
        "| sources that see it | share of pixels | mean confidence | median confidence | mean error |",
        "|---|---|---|---|---|",
    ]
    for count in range(int(pixels.seen.max()) + 1):
        here = pixels.seen == count
        if here.any():
            confidence, error = pixels.confidence[here], pixels.error[here]
            cells = [f"{100 * here.double().mean():.1f} %", f"{confidence.mean():.3f}", f"{confidence.median():.3f}"]
            lines.append(f"| {count} | " + " | ".join(cells) + f" | {error.mean():.4f} |")
    return lines


def hidden_detection(pixels: Pixels) -> float:
    """Probability that a pixel seen by two or more sources has the higher confidence of a random pair (AUC)."""
    hidden = pixels.hidden
    assert hidden is not None
    if not hidden.any() or hidden.all():
        return float("nan")
    rank = ranks(pixels.confidence) + 1
    n_seen, n_hidden = int((~hidden).sum()), int(hidden.sum())
    return ((rank[~hidden].sum() - n_seen * (n_seen + 1) / 2) / (n_seen * n_hidden)).item()


def plot(groups: dict[str, Pixels], path: Path) -> None:
    """Reliability, error by confidence, and sparsification, side by side, as SVG or PNG by the file's suffix."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "idnerf"  # the same data gives the same file
    from matplotlib import pyplot

    figure, (claim, by_decile, sparse) = pyplot.subplots(1, 3, figsize=(12, 3.8), constrained_layout=True)
    for name, pixels in groups.items():
        bins = confidence_bins(pixels.confidence, pixels.error)
        claim.plot([b.confidence for b in bins], [b.within for b in bins], marker=".", label=TITLES[name])
        by_decile.plot(range(1, 11), [b.error for b in bins], marker=".")
        curve = sparsification(pixels.error, pixels.confidence)
        colour = sparse.plot(torch.arange(STEPS) / STEPS, curve / curve[0], label=TITLES[name])[0].get_color()
        oracle = sparsification(pixels.error, -pixels.error)
        sparse.plot(torch.arange(STEPS) / STEPS, oracle / oracle[0], color=colour, linestyle=":")
    claim.plot([0, 1], [0, 1], color="black", linewidth=0.8)
    claim.set(xlabel="confidence", ylabel="share with error < 0.1", title="claimed and observed")
    claim.legend(fontsize=7)
    by_decile.set(xlabel="decile of confidence", ylabel="mean absolute error", title="error by confidence")
    by_decile.set_ylim(bottom=0)
    sparse.set(
        xlabel="share of least confident pixels left out",
        ylabel="mean error of the rest, relative",
        title="sparsification (dotted: by true error)",
    )
    for axes in (claim, by_decile, sparse):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def findings(groups: dict[str, Pixels]) -> list[str]:
    """What the figures say, in words."""
    lines = []
    for name, pixels in groups.items():
        correlation = spearman(pixels.confidence, pixels.error)
        _, share = area_above_oracle(pixels.error, pixels.confidence)
        bins = confidence_bins(pixels.confidence, pixels.error)
        word = {
            "yes": "predicts error",
            "weakly": "predicts error only weakly",
            "no": "**does not predict error**",
        }[verdict(correlation, share)]
        ratio = bins[0].error / max(bins[-1].error, 1e-9)
        lines.append(
            f"* {TITLES[name]}: confidence {word} (Spearman {correlation:+.2f}; the least confident tenth has "
            f"{ratio:.1f} times the error of the most confident tenth)."
        )
    procedural = groups.get("procedural")
    if procedural is not None and procedural.hidden is not None and procedural.hidden.any():
        hidden = procedural.hidden
        low, high = procedural.confidence[hidden].mean(), procedural.confidence[~hidden].mean()
        word = "get lower confidence" if low < high else "do **not** get lower confidence"
        lines.append(
            f"* Pixels that fewer than two sources see {word}: {low:.2f} on average, the others {high:.2f}; of a "
            f"random pair, the seen one has the higher confidence with probability {hidden_detection(procedural):.2f}."
        )
    return lines


def document(groups: dict[str, Pixels], picture: str, digest: str, command: str = COMMAND) -> str:
    """docs/confidence.md, as ``command`` wrote it."""
    lines = [
        "# Confidence",
        "",
        "Every rendering carries a `confidence` per pixel in [0, 1]: the network predicts the scale b of a Laplace",
        "distribution of the colour error, and confidence is the probability 1 - exp(-0.1 / b) that the error stays "
        "below 0.1.",
        f"Does it? Written by `{command}`, not by hand. "
        f"Weights: SHA-256 `{digest}`; three sources; error: mean absolute difference over the channels, images in "
        "[0, 1].",
        "",
        *findings(groups),
        "",
        f"![Claimed and observed, error by decile, sparsification]({picture})",
        "",
        *summary_table(groups),
        "",
        "*Spearman*: rank correlation of confidence and error, -1 at best. *AUSE*: mean gap between the sparsification "
        "curve (mean error of what is kept as the least confident pixels are left out) and that of the true error, "
        "over the mean error; *of random*: its share of what an ordering at random gives, 0 at best, 1 knows nothing. "
        "*Calibration error*: mean gap between claimed and observed probability over deciles. *Predicts error*: yes "
        "below -0.4 and 0.5, weakly below -0.2 and 0.8.",
    ]
    for name, pixels in groups.items():
        if name in ("procedural", "half"):
            lines += ["", f"## Deciles: {TITLES[name]}", "", *bins_table(pixels)]
    if "procedural" in groups:
        lines += ["", "## What few sources see", "", "Procedural test scenes, where exact depth tells."]
        lines += ["", *seen_table(groups["procedural"])]
    return "\n".join(lines) + "\n"


def main(
    out: Path,
    data: Path | None = None,
    weights: str = "default",
    work: Path = Path("out/scoreboard"),
    scenes: Path | None = None,
    picture: Path | None = None,
    quick: bool = False,
    minutes: float = float("inf"),
    device: str = "auto",
) -> None:
    """Write the document and its picture.

    Args:
        out: the document.
        data: folder of the development scenes; none leaves them out.
        weights: `default`, a file, a run folder or a hub id.
        work: folder of finished renderings: a run goes on where the last one stopped.
        scenes: folder of the rendered procedural scenes; WORK/scenes by default.
        picture: the plot, .svg or .png; images/confidence.svg beside the document by default.
        quick: 16 of the 64 procedural scenes.
        minutes: begin no photo after so long.
        device: auto, cpu or cuda.
    """
    keep_freed_memory()
    where, deadline = choose_device(device), time.monotonic() + 60 * minutes
    render = load_model(weights, where).render
    folder = work / "confidence" / weights_row(weights)
    folder.mkdir(parents=True, exist_ok=True)
    limit = QUICK_SCENES if quick else None
    files = {"procedural": render_procedural(render, scenes or work / "scenes", limit, folder, where)}
    if data is not None:
        files |= render_photos(render, data, folder, where, deadline)
    groups = {name: gather(paths) for name, paths in files.items()}
    picture = picture or out.parent / "images" / "confidence.svg"
    plot(groups, picture)
    command = (COMMAND if data is not None else COMMAND.replace(" --data DATA", "")) + " --quick" * quick
    text = document(groups, picture.relative_to(out.parent).as_posix(), weights_hash(weights), command)
    out.write_text(text, encoding="utf-8")
    print(f"{out}, {picture}")
    print("\n".join(findings(groups)))


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except InputError as error:
        sys.exit(f"error: {error}")
