"""A depth range that leaves surfaces out ruins a picture: look beyond it before rendering, and widen it where needed.

given near, far --widen by REACH--> coarse volume of at most 1/16 of the pixels --cells on texture vote--> near, far

Near and far of own photos are guesses, and a surface outside them cannot be rendered in its place. The votes only
widen, and only on texture: what widening a right range for nothing costs is in docs/limits.md. Few cells that are sure
suffice, or many that are not.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from idnerf.geometry.cameras import resize
from idnerf.geometry.projection import (
    bilinear_lookup,
    frustum_homography,
    homography_rays,
    safe_depth,
    visible,
)
from idnerf.geometry.rays import pixel_centers
from idnerf.models.feature_pyramid import PyramidFeatures
from idnerf.models.frustum_volume import DepthDistribution, FrustumVolume
from idnerf.rendering.sampling import inverse_depth_planes
from idnerf.types import Cameras

REACH = 2.5
"""How far beyond near and far to look, as a factor."""
PROBE_SCALE = 4
"""The target is probed at this fraction of its size, or at less (``LARGEST_PROBE``)."""
LARGEST_PROBE = 1 << 17
"""Pixels of a probe at most, a quarter of 1920x1080 along each side; larger targets are probed at less."""
TEXTURED = 0.03
"""Cells vote where every view that sees their likeliest point shows at least this standard deviation of colour around
it: an even backdrop matches at any depth behind the object, and what the network says of it is a guess."""
PEAKED = 0.6
"""Cells are sure that have this much probability within two planes of their likeliest one."""
TEXTURE_WINDOW = 9
"""Pixels of a photo along each side that this deviation is taken over."""
FEWEST_SURE = 0.01
"""Share of all cells that moves near if they are sure of depths before it."""
FEWEST_SURE_FAR = 0.04
"""The same beyond far. Small pictures of lego have 1 to 3 % where its edges meet the white ground, wrongly."""
FEWEST_NEAR_VOTES = 0.11
"""The same for cells that need not be sure, before near. On the fixed test scenes 0 to 2 % vote for depths nearer than
a right near, typically 12 to 67 % where near is twice too far; on lego's white ground in small pictures up to 9 %, from
frame to frame of a video more or fewer."""
FEWEST_FAR_VOTES = 0.17
"""The same beyond far. On 16 of the fixed test scenes typically 20 to 70 % vote there where far is half of what it
should be; where it is right and many do, widening helps as often as it hurts. On photos 0 to 2 % do, on lego's white
ground 3 to 15 %, which are wrong and cost up to 2 dB."""
BEYOND = 1.04
"""A vote lies beyond the range from this factor on: two planes of the coarse volume."""
STEP = 1.15
"""Ranges widen in steps of this factor, so that views that need about the same have the same."""
PROBED_FRAMES = 12
"""Frames of a path, evenly spaced, that say how far its bounds move."""
FRAMES_THAT_MOVE = 1 / 3
"""Share of them that must want a bound as far outwards as it moves for all."""


def fitted_range(
    volume: FrustumVolume,
    features: PyramidFeatures,
    source: Cameras,
    target: Cameras,
    planes: int,
    enlargement: int = 1,
    texture: Float[Tensor, "image height4 width4"] | None = None,
) -> Cameras:
    """``target`` [batch] with near and far moved apart where enough matches lie beyond them.

    Args:
        source: [batch view].
        planes: of the volume over the given range; the wider one gets as many per unit of inverse depth.
        enlargement: of the photos before they were encoded.
        texture: what ``photo_texture`` makes of these photos; None has it made here.
    """
    texture = photo_texture(features, enlargement) if texture is None else texture
    wide = replace(resize(target, probe_size(target.size)), near=target.near / REACH, far=target.far * REACH)
    # as many planes per unit of inverse depth as in the given range; 1/far hardly counts
    ratio = ((1 / wide.near - 1 / wide.far) / (1 / target.near - 1 / target.far)).max()
    count = max(2, min(round(planes * float(ratio)), 4 * planes))
    depths = 1 / inverse_depth_planes(wide.near, wide.far, count)  # batch plane, nearest first
    likeliest, peaked = votes(volume(features, source, wide, count))
    found = depths.gather(1, likeliest.flatten(1))
    voting = textured(texture, source, wide, found, enlargement)
    sure = voting & peaked.flatten(1)
    near = torch.minimum(
        widened(found, sure, FEWEST_SURE, target.near, nearer=True),
        widened(found, voting, FEWEST_NEAR_VOTES, target.near, nearer=True),
    )
    far = torch.maximum(
        widened(found, sure, FEWEST_SURE_FAR, target.far, nearer=False),
        widened(found, voting, FEWEST_FAR_VOTES, target.far, nearer=False),
    )
    return target.with_bounds(near, far)


def fitted_path(fit: Callable[[Cameras], Cameras], path: Cameras) -> Cameras:
    """The cameras [frame] of one path with near and far moved by factors of the whole path: were every frame to decide
    for itself, a vote more or less would show as a jump in the video.

    Args:
        fit: gives one camera [1] the range that it needs.
    """
    frames = len(path)
    probed = sorted({round(i * (frames - 1) / max(1, PROBED_FRAMES - 1)) for i in range(PROBED_FRAMES)})
    given, fitted = path[probed], [fit(path[i : i + 1]) for i in probed]
    nearer = given.near / torch.cat([camera.near for camera in fitted])
    farther = torch.cat([camera.far for camera in fitted]) / given.far
    enough = math.ceil(len(probed) * FRAMES_THAT_MOVE) - 1
    nearer, farther = (factors.sort(descending=True).values[enough] for factors in (nearer, farther))
    return path.with_bounds(path.near / nearer, path.far * farther)


def probe_size(size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) at which a target of ``size`` is probed: multiples of two cells of the coarse volume."""
    width, height = size
    scale = max(PROBE_SCALE, math.ceil(math.sqrt(width * height / LARGEST_PROBE)))
    stride = FrustumVolume.scale * 2
    return max(stride, width // scale // stride * stride), max(stride, height // scale // stride * stride)


def votes(
    distribution: DepthDistribution,
) -> tuple[Int64[Tensor, "batch height4 width4"], Bool[Tensor, "batch height4 width4"]]:
    """Likeliest plane of every cell, and whether the cell is sure: its probability is peaked there.

    Nobody is sure of the outermost planes: a distribution that leans against its end has its peak beyond it.
    """
    probabilities = distribution.log_probabilities.exp()
    planes = probabilities.shape[1]
    likeliest = probabilities.argmax(1)
    around = torch.arange(-2, 3, device=likeliest.device)[:, None, None] + likeliest[:, None]
    mass = (probabilities.gather(1, around.clamp(0, planes - 1)) * ((around >= 0) & (around < planes))).sum(1)
    return likeliest, (mass > PEAKED) & (likeliest > 0) & (likeliest < planes - 1)


@torch.no_grad()
def photo_texture(features: PyramidFeatures, enlargement: int) -> Float[Tensor, "image height4 width4"]:
    """Standard deviation of colour around every fourth pixel of the photos as they were before they were enlarged."""
    colours = F.avg_pool2d(features.fine[..., -3:].flatten(0, 1).movedim(-1, 1), enlargement)

    def blurred(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, TEXTURE_WINDOW, FrustumVolume.scale, TEXTURE_WINDOW // 2, count_include_pad=False)

    return (blurred(colours.square()) - blurred(colours).square()).mean(1).clamp_min(0).sqrt()


def textured(
    texture: Float[Tensor, "image height4 width4"],
    source: Cameras,
    target: Cameras,
    depths: Float[Tensor, "batch cell"],
    enlargement: int = 1,
) -> Bool[Tensor, "batch cell"]:
    """Whether each cell's point at that depth lies on texture in all views that see it, two at least."""
    scale = FrustumVolume.scale
    size = (target.width // scale, target.height // scale)
    pixels = pixel_centers(size, target.device).reshape(-1, 2) * scale
    A, b = frustum_homography(target, source)
    moved = homography_rays(A, pixels) + b[:, :, None] / depths[:, None, :, None]
    positions = moved[..., :2] / safe_depth(moved[..., 2:])
    seen = visible(positions, moved[..., 2], source.size)
    # a pooled cell is centred on every scale-th pixel
    found = bilinear_lookup(texture[..., None], (positions.flatten(0, 1) / enlargement - 0.5) / scale + 0.5)
    found = found[..., 0].unflatten(0, source.shape)
    return torch.where(seen, found > TEXTURED, True).all(1) & (seen.sum(1) >= 2)


def widened(
    depths: Float[Tensor, "batch cell"],
    voting: Bool[Tensor, "batch cell"],
    fewest: float,
    bound: Float[Tensor, "batch"],
    nearer: bool,
) -> Float[Tensor, "batch"]:
    """``bound`` moved outwards, in whole steps, past all but half of the ``fewest`` votes that count.

    No branch depends on a value: on a GPU each would wait for all that is queued there.

    Args:
        voting: cells whose depth is a vote.
        fewest: share of all cells that must vote for depths beyond the bound.
    """
    needed = fewest * depths.shape[1]
    if nearer:
        outermost_first = depths.masked_fill(~voting, torch.inf).sort(1).values
        beyond = outermost_first < bound[:, None] / BEYOND
    else:
        outermost_first = depths.masked_fill(~voting, -torch.inf).sort(1, descending=True).values
        beyond = outermost_first > bound[:, None] * BEYOND
    factor = (outermost_first[:, int(needed / 2)] / bound).clamp_min(1e-30).double()
    moved = STEP ** ((factor.log().abs() / math.log(STEP)).ceil() + 1).to(bound.dtype)
    return torch.where(beyond.sum(1) >= max(1.0, needed), bound / moved if nearer else bound * moved, bound)
