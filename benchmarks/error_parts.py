"""What the error of a rendered photo is made of: what no source shows, and what lies a fraction of a pixel away."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from boards import Scores
from idnerf.evaluation.evaluator import HIGHEST_PSNR
from idnerf.evaluation.metrics import psnr
from idnerf.geometry.projection import project, visible
from idnerf.geometry.rays import unproject
from idnerf.training.losses import psnr_of_mse
from idnerf.types import Cameras, RenderOutput

BLOCK = 32
"""Side of the blocks that are moved as a whole."""
SHIFTS = tuple(number / 4 for number in range(-6, 7))
"""Pixels by which a block is moved along each axis, every pair of them."""


def shifted(image: Float[Tensor, "3 height width"], dx: float, dy: float) -> Float[Tensor, "3 height width"]:
    """What the image shows (dx, dy) pixels further right and down, bicubic."""
    height, width = image.shape[-2:]
    y, x = torch.meshgrid(torch.arange(height) + 0.5 + dy, torch.arange(width) + 0.5 + dx, indexing="ij")
    grid = torch.stack([2 * x / width - 1, 2 * y / height - 1], -1)[None]
    return F.grid_sample(image[None], grid, mode="bicubic", padding_mode="border", align_corners=False)[0]


def block_errors(
    rgb: Float[Tensor, "3 height width"], truth: Float[Tensor, "3 height width"]
) -> Float[Tensor, "shift rows columns"]:
    """Mean squared error of every whole block under every shift, the unmoved one first."""
    shifts = sorted(((dx, dy) for dx in SHIFTS for dy in SHIFTS), key=lambda s: s[0] ** 2 + s[1] ** 2)
    return torch.stack([F.avg_pool2d((shifted(rgb, *s) - truth).square().mean(0)[None], BLOCK)[0] for s in shifts])


def in_frame(depth: Float[Tensor, "height width"], target: Cameras, source: Cameras) -> Float[Tensor, "height width"]:
    """Number of [view] sources in whose image the rendered surface of each pixel lies; hidden or not."""
    points = unproject(target, depth).reshape(1, -1, 3)
    pixels, z = project(points.expand(len(source), -1, -1), source)
    return visible(pixels, z, source.size).sum(0).reshape(depth.shape)


def error_parts(
    output: RenderOutput,
    truth: Float[Tensor, "3 height width"],
    source: Cameras,
    target: Cameras,
    window: tuple[slice, slice],
) -> Scores:
    """Of the scored window: PSNR; share of the pixels that not all sources frame, and of the squared error on them;
    PSNR of the others; PSNR before and after every block has moved to where it fits best.
    """
    rgb = output.rgb.clamp(0, 1)
    here = (..., *window)
    frames = in_frame(output.depth, target, source)[here]
    everywhere = frames == len(source)
    squares = (rgb - truth)[here].square().mean(0)
    blocks = block_errors(rgb[here], truth[here])
    return {
        "psnr": min(psnr(rgb[here], truth[here]), HIGHEST_PSNR),
        "cut": (~everywhere).double().mean().item(),
        "error_there": (squares[~everywhere].sum() / squares.sum().clamp_min(1e-12)).item(),
        "psnr_elsewhere": min(psnr(rgb[here], truth[here], everywhere), HIGHEST_PSNR),
        "unmoved": psnr_of_mse(float(blocks[0].mean())),
        "moved": psnr_of_mse(float(blocks.amin(0).mean())),
    }


def parts_table(records: dict[str, Scores]) -> list[str]:
    """One line per photo."""
    lines = [
        "| photo | PSNR | not framed by all sources: pixels | error | PSNR of the rest | gain of moved blocks |",
        "|---|---|---|---|---|---|",
    ]
    for name, s in records.items():
        cells = [f"{100 * s['cut']:.1f} %", f"{100 * s['error_there']:.0f} %", f"{s['psnr_elsewhere']:.2f}"]
        cells.append(f"{s['moved'] - s['unmoved']:+.2f}")
        lines.append(f"| {name} | {s['psnr']:.2f} | " + " | ".join(cells) + " |")
    return lines
