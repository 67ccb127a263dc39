"""From radiance to photos: exposure, tone curve, and what lenses, sensors, cameras and file formats do."""

import io
import math
import random

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from idnerf.data.procedural.rigs import loguniform

Photos = Float[Tensor, "view 3 height width"]
Masks = Float[Tensor, "view height width"]


def develop(images: Photos, coverage: Masks, rng: random.Random) -> Photos:
    """Expose all views alike (mid grey of the scene at a random level) and encode for display (gamma 2.2).

    Only pixels with a ``coverage`` above one half count for the exposure.
    """
    luminance = images.mean(1)[coverage > 0.5]
    luminance = luminance[:: max(len(luminance) // 20000, 1)].sort().values
    if len(luminance) == 0:
        luminance = torch.full((1,), 0.2)
    middle, bright = float(luminance[len(luminance) // 2]), float(luminance[int(0.97 * len(luminance))])
    by_middle = loguniform(rng, 0.09, 0.3) / max(middle, 1e-4)
    by_highlights = rng.uniform(0.6, 1.15) / max(bright, 1e-4)
    # Before a white backdrop the median is the backdrop: only the highlights count then.
    gain = by_highlights if middle > 0.7 * bright else min(by_middle, by_highlights)
    exposed = images * gain
    # A shoulder above 0.6 keeps bright regions from clipping hard.
    rolled = torch.where(exposed > 0.6, 0.6 + 0.4 * torch.tanh((exposed - 0.6) / 0.4), exposed)
    encoded = rolled.clamp(0, 1) ** (1 / 2.2)
    # The S-curve of camera pictures: contrast by ``steepness`` about mid grey.
    steepness = rng.uniform(0.9, 1.5)
    up, down = encoded**steepness, (1 - encoded) ** steepness
    curved = up / (up + down)
    # Cameras also use the range they have: most pictures hold something nearly black and something nearly white.
    levels = curved.mean(1)[coverage > 0.5][::7].sort().values
    if len(levels) < 100:
        return curved
    low, high = float(levels[int(0.01 * len(levels))]), float(levels[int(0.985 * len(levels))])
    share = rng.choice([0.0, 0.5, 0.8, 1.0])
    black, white = share * max(low - 0.04, 0.0), 1 - share * max(0.88 - high, 0.0)
    return ((curved - black) / (white - black)).clamp(0, 1)


def composite(images: Photos, coverage: Masks, backdrop: tuple[float, float, float]) -> Photos:
    """Images over an even backdrop, mixed as displayed (what Blender's RGBA files on white come to)."""
    share = coverage[:, None]
    return images * share + images.new_tensor(backdrop)[:, None, None] * (1 - share)


def photograph(images: Photos, strength: float, rng: random.Random, generator: torch.Generator) -> Photos:
    """What cameras do to photos of one scene: drift of exposure and white balance, vignetting, lens blur,
    sharpening, sensor noise. Half of the scenes are neither blurred nor sharpened: crisp to the pixel, as
    photos are that were reduced in size."""
    count = len(images)
    scene_drift = strength * rng.choices([0.0, 0.006, 0.02, 0.06], [40, 30, 22, 8])[0]
    exposure = torch.exp(scene_drift * torch.randn(count, 1, 1, 1, generator=generator))
    balance = torch.exp(0.4 * scene_drift * torch.randn(count, 3, 1, 1, generator=generator))
    images = images * (exposure * balance).to(images.device)
    fall_off = strength * rng.choice([0.0, 0.0, rng.uniform(0.0, 0.2)])
    if fall_off > 0:
        images = images * vignette(images, fall_off)
    sigma, amount = strength * rng.uniform(0.15, 0.6), strength * rng.uniform(0.1, 0.5)
    kind = rng.choices(["crisp", "soft", "sharpened"], [50, 25, 25])[0]
    if kind == "soft":
        images = blur(images, sigma)
    elif kind == "sharpened":
        images = sharpen(images, amount)
    level = strength * loguniform(rng, 0.0005, 0.01)
    return (images + level * torch.randn(images.shape, generator=generator).to(images.device)).clamp(0, 1)


def vignette(images: Photos, fall_off: float) -> Float[Tensor, "height width"]:
    """Gain that falls with the square of the distance from the middle, by ``fall_off`` at the corners."""
    height, width = images.shape[-2:]
    y = torch.linspace(-1, 1, height, device=images.device)[:, None]
    x = torch.linspace(-1, 1, width, device=images.device)
    return 1 - min(fall_off, 0.9) * (x * x + y * y) / 2


def sharpen(images: Photos, amount: float) -> Photos:
    """Unsharp mask with a radius under a pixel: bright and dark seams along edges."""
    return (images + amount * (images - blur(images, 0.75))).clamp(0, 1)


def blur(images: Photos, sigma: float) -> Photos:
    """Three-tap Gaussian blur; ``sigma`` in pixels, below about 0.8."""
    side = math.exp(-0.5 / sigma**2)
    for axis in (2, 3):
        last = images.shape[axis] - 1
        first_row, last_row = images.narrow(axis, 0, 1), images.narrow(axis, last, 1)
        before = torch.cat([first_row, images.narrow(axis, 0, last)], axis)
        after = torch.cat([images.narrow(axis, 1, last), last_row], axis)
        images = (images + side * (before + after)) / (1 + 2 * side)
    return images


def compress(images: Photos, strength: float, rng: random.Random) -> Photos:
    """JPEG compression of half of the scenes, quality 75 to 98 at ``strength`` 1, chroma at half size mostly."""
    worst = strength * rng.choice([2, 5, 10, 15, 25])
    chosen, subsampling = rng.random() < 0.5, rng.choice([0, 2, 2])
    if not chosen:
        return images
    return through_jpeg(images, max(round(100 - worst), 10), subsampling)


def through_jpeg(images: Photos, quality: int, subsampling: int) -> Photos:
    """Encode and decode; ``subsampling``: 0 keeps full chroma, 2 halves it both ways (Pillow's codes)."""
    pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    decoded = []
    for picture in pixels:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=quality, subsampling=subsampling)
        decoded.append(np.asarray(Image.open(file)))
    return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).to(images.device).float() / 255
