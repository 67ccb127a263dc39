"""Depth maps as files: .npy (float32), .png (16 bits and a scale), .exr (float32). Depth is z, 0 is unknown."""

from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image, PngImagePlugin
from torch import Tensor

from idnerf.errors import InputError
from idnerf.export.atomic import whole_file
from idnerf.export.exr import write_exr

DEPTH_SUFFIXES = (".npy", ".png", ".exr")
SCALE_KEY = "depth_scale"
"""Text chunk of a depth PNG: scene units per step, so that depth = value * scale."""


def depth_scale(far: float) -> float:
    """Scene units per step of a 16-bit PNG that reaches ``far``, rounded up to two digits.

    The rounding leaves slack above ``far`` and makes a number that can be passed on by hand.
    """
    exponent = np.floor(np.log10(far / 65535)) - 1
    return float(f"{np.ceil(far / 65535 / 10**exponent) * 10**exponent:.1e}")


def write_depth(path: Path, depth: Float[Tensor, "height width"], scale: float) -> None:
    """Write a depth map; ``scale`` (scene units per step) serves .png alone.

    Raises:
        InputError: another suffix, a depth that 16 bits at this scale cannot hold, or a place that cannot be written.
    """
    suffix = path.suffix.lower()
    if suffix not in DEPTH_SUFFIXES:
        raise InputError(f"expected a depth map ending in {', '.join(DEPTH_SUFFIXES)}; got {path.name!r}")
    if suffix == ".exr":
        return write_exr(path, depth)
    values = depth.detach().cpu().float().numpy()
    if suffix == ".npy":
        with whole_file(path) as temporary, open(temporary, "wb") as file:  # by name, NumPy would add an ending
            np.save(file, values)
        return None
    steps = np.round(values.astype(np.float64) / scale)
    if steps.max(initial=0) > 65535:
        raise InputError(
            f"depth up to {values.max():.4g} does not fit 16 bits at {scale:.3g} scene units a step; write .npy or .exr"
        )
    text = PngImagePlugin.PngInfo()
    text.add_text(SCALE_KEY, repr(scale))
    with whole_file(path) as temporary:
        Image.fromarray(steps.astype(np.uint16)).save(temporary, format="PNG", pnginfo=text)
    return None
