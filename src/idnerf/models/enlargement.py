"""Source photos enlarged before they are encoded: feature maps with more cells per pixel, colours between pixels.

A photo of few pixels is looked up between its pixels everywhere, and bilinearly that blurs; enlarged with a cubic
kernel it loses less, and matching at 1/4 of the larger size is finer.
"""

import torch.nn.functional as F

from idnerf.geometry.cameras import resize
from idnerf.types import Views

ENLARGEMENT = 2
"""Factor along each side."""


def enlarged(views: Views) -> Views:
    """The views at ``ENLARGEMENT`` times their width and height, by bicubic interpolation clamped to [0, 1]."""
    images, (width, height) = views.images, views.cameras.size
    flat = images.reshape(-1, *images.shape[-3:])
    large = F.interpolate(flat, scale_factor=ENLARGEMENT, mode="bicubic", align_corners=False).clamp(0, 1)
    large = large.reshape(*images.shape[:-2], *large.shape[-2:])
    return Views(large, resize(views.cameras, (width * ENLARGEMENT, height * ENLARGEMENT)))
