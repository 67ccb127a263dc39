"""Source photos enlarged before they are encoded: feature maps with more cells per pixel, colours between pixels.

A photo of few pixels is looked up between its pixels everywhere, and bilinearly that blurs; enlarged with a cubic
kernel it loses less, and matching at 1/4 of the larger size is finer.
"""

import torch.nn.functional as F

from idnerf.geometry.cameras import resize
from idnerf.types import Views

EVEN_WINDOW = 9
"""Pixels along each side within which a photo is even, or is not."""
EVEN = 0.002
"""Standard deviation of colour below this is even: no photographed surface is, only a ground painted in or masked."""
MOST_EVEN = 0.25
"""Photos with a larger even share are not enlarged: it cost 1.4 dB on lego (docs/cascade.md)."""
ENLARGEMENT = 2
"""Factor along each side."""


def enlarged(views: Views) -> Views:
    """The views at ``ENLARGEMENT`` times their width and height, by bicubic interpolation clamped to [0, 1]."""
    images, (width, height) = views.images, views.cameras.size
    flat = images.reshape(-1, *images.shape[-3:])
    large = F.interpolate(flat, scale_factor=ENLARGEMENT, mode="bicubic", align_corners=False).clamp(0, 1)
    large = large.reshape(*images.shape[:-2], *large.shape[-2:])
    return Views(large, resize(views.cameras, (width * ENLARGEMENT, height * ENLARGEMENT)))


def even_share(views: Views) -> float:
    """Share of the photos' windows that are of one even colour, in [0, 1]."""
    images = views.images.reshape(-1, *views.images.shape[-3:])
    mean, square = (F.avg_pool2d(x, EVEN_WINDOW, EVEN_WINDOW // 2) for x in (images, images.square()))
    deviation = (square - mean.square()).mean(1).clamp_min(0).sqrt()
    return float((deviation < EVEN).float().mean())
