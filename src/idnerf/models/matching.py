"""Reprojection and matching: what the source views show at points in space, and how much pairs agree.

MatchNeRF (arXiv 2304.12294), section 3.2. Points are a flat axis; the matching cue is a mean over pairs, so
its width does not depend on the number of views.
"""

import functools
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from idnerf.compiled import dispatch, gradients
from idnerf.geometry.cameras import invert_rigid
from idnerf.geometry.precision import full_precision
from idnerf.geometry.projection import bilinear_lookup, safe_depth
from idnerf.models.behaviour import Behaviour
from idnerf.models.gmflow import PairMaps, view_pairs
from idnerf.types import Cameras

CACHED_POINTS = 2048
"""Points whose 128 channels (1 MB) stay in a core's cache from one operation to the next."""


@functools.cache
def pair_index(views: int, device: torch.device) -> Int[Tensor, "pair 2"]:
    """The pairs of ``views`` as an index, made once on each device: every chunk of rays asks for it."""
    with torch.inference_mode(False):  # else no training could use what a rendering had made
        return torch.tensor(view_pairs(views), device=device)


@dataclass(frozen=True)
class Taps:
    """Weighted rows of a table that make up what is looked up at each of some points.

    Attributes:
        rows: of a map flattened to [cell, channel], or of its ``corner_products``.
        weights: of these rows.
    """

    rows: Int[Tensor, "*batch point tap"]
    weights: Float[Tensor, "*batch point tap"]

    def __getitem__(self, index: tuple[int, ...]) -> "Taps":
        """Index the leading axes."""
        return Taps(self.rows[index], self.weights[index])

    def split(self, size: int) -> "list[Taps]":
        """Pieces of ``size`` points; there are no leading axes."""
        pieces = zip(self.rows.split(size), self.weights.split(size), strict=True)
        return [Taps(rows, weights) for rows, weights in pieces]


def bilinear_taps(positions: Float[Tensor, "*batch point 2"], size: tuple[int, int]) -> tuple[Taps, Taps]:
    """Taps at positions in cells (centres at +0.5) of a map of ``size`` (width, height), border values outside.

    Returns the four of a map, and the nine of its ``corner_products``: for the squared length of what is looked up.
    """
    width, height = size
    u = (positions[..., 0].detach() - 0.5).clamp(0, width - 1)
    v = (positions[..., 1].detach() - 0.5).clamp(0, height - 1)
    u0, v0 = u.floor().clamp_max(max(width - 2, 0)), v.floor().clamp_max(max(height - 2, 0))
    u, v = u - u0, v - v0
    first = (v0 * width + u0).int()[..., None]
    right, below = int(width > 1), width * int(height > 1)
    linear = outer(torch.stack([1 - v, v], -1), torch.stack([1 - u, u], -1))
    quadratic = outer(
        torch.stack([(1 - v) ** 2, v * (1 - v), v**2], -1), torch.stack([(1 - u) ** 2, u * (1 - u), u**2], -1)
    )
    return (
        Taps(first + first.new_tensor([0, right, below, below + right]), linear),
        Taps(first * 9 + torch.arange(9, dtype=first.dtype, device=first.device), quadratic),
    )


def outer(
    first: Float[Tensor, "*batch rows"], second: Float[Tensor, "*batch columns"]
) -> Float[Tensor, "*batch cells"]:
    """All products of an entry of ``first`` with one of ``second``, row by row."""
    return (first[..., :, None] * second[..., None, :]).flatten(-2)


def weighted_rows(table: Float[Tensor, "row channel"], taps: Taps) -> Float[Tensor, "point channel"]:
    """Weighted sums of rows; one pass over memory, where ``table[rows]`` would write every tap out first."""
    return F.embedding_bag(taps.rows, table, per_sample_weights=taps.weights, mode="sum")


@dataclass(frozen=True)
class Reprojection:
    """Where points land in the source views.

    Attributes:
        pixels: positions in each view, centres at +0.5; meaningless where not visible.
        visible: in front of the camera and inside its image.
        taps: of every scale of maps, see ``bilinear_taps``; None where they were not prepared (``with_taps``).
    """

    pixels: Float[Tensor, "batch view point 2"]
    visible: Bool[Tensor, "batch view point"]
    taps: tuple[tuple[Taps, Taps], ...] | None = None


@full_precision
def reproject(points: Float[Tensor, "batch point 3"], sources: Cameras, behaviour: Behaviour) -> Reprojection:
    """World points into every source view; ``sources`` is [batch view]."""
    to_pixels = sources.K @ invert_rigid(sources.c2w)[..., :3, :]
    # As ``project``, but one product for all views, with the points last in memory.
    homogeneous = to_pixels[..., :3].flatten(1, 2) @ points.transpose(1, 2) + to_pixels[..., 3].flatten(1)[..., None]
    u, v, depth = homogeneous.unflatten(1, (-1, 3)).unbind(2)
    safe = safe_depth(depth)
    pixels = torch.stack([u / safe, v / safe], -1)
    return Reprojection(pixels, behaviour.visible(pixels, depth, sources.size))


def with_taps(reprojection: Reprojection, maps: PairMaps, behaviour: Behaviour) -> Reprojection:
    """The same with taps, for the CPU, where everything that is looked up at the points shares them.

    Compiled lookups need none.
    """
    if reprojection.pixels.device.type != "cpu" or reprojection.taps is not None:
        return reprojection
    if gradients.chosen(*maps.scales, reprojection.pixels) is not None:
        return reprojection
    taps = []
    for scale in maps.scales:
        size = (scale.shape[4], scale.shape[3])
        taps.append(bilinear_taps(behaviour.map_positions(reprojection.pixels, maps.padded_size, size), size))
    return replace(reprojection, taps=tuple(taps))


def lookup_colours(
    images: Float[Tensor, "batch view height width 3"], pixels: Float[Tensor, "batch view point 2"]
) -> Float[Tensor, "batch view point 3"]:
    """Bilinear colours of channels-last images, border values outside."""
    look_up = dispatch.look_up if dispatch.usable(images, pixels) else bilinear_lookup
    colours = look_up(images.flatten(0, 1), pixels.flatten(0, 1))
    return colours.unflatten(0, images.shape[:2])


def lookup_pairs(
    maps: Float[Tensor, "batch pair member height width channel"],
    positions: Float[Tensor, "batch pair member point 2"],
) -> Float[Tensor, "batch pair member point channel"]:
    """Features of both members of every pair, one bilinear tap at positions in cells (centres at +0.5)."""
    features = bilinear_lookup(maps.flatten(0, 2), positions.flatten(0, 2))
    return features.unflatten(0, maps.shape[:3])


def lookup_views(
    maps: Float[Tensor, "batch view height width channel"],
    reprojection: Reprojection,
    level: int,
    padded_size: tuple[int, int],
    behaviour: Behaviour,
) -> Float[Tensor, "batch view point channel"]:
    """Bilinear lookup in one map for each view, at scale ``level`` (0 coarse, 1 fine)."""
    if reprojection.taps is None:
        positions = behaviour.map_positions(reprojection.pixels, padded_size, (maps.shape[3], maps.shape[2]))
        return bilinear_lookup(maps.flatten(0, 1), positions.flatten(0, 1)).unflatten(0, maps.shape[:2])
    linear, _ = reprojection.taps[level]
    tables = maps.flatten(2, 3).flatten(0, 1).unbind()
    rows, weights = linear.rows.flatten(0, 1), linear.weights.flatten(0, 1)
    looked_up = [weighted_rows(table, Taps(rows[i], weights[i])) for i, table in enumerate(tables)]
    return torch.stack(looked_up).unflatten(0, maps.shape[:2])


def groupwise_cosine(
    first: Float[Tensor, "*batch channel"], second: Float[Tensor, "*batch channel"], groups: int
) -> Float[Tensor, "*batch group"]:
    """Cosine similarity in each of ``groups`` equal blocks of channels; 0 where a block is zero."""
    squares = group_sums(first * first, groups) * group_sums(second * second, groups)
    return group_sums(first * second, groups) * squares.clamp_min(1e-16).rsqrt()


def group_sums(values: Float[Tensor, "*batch channel"], groups: int) -> Float[Tensor, "*batch group"]:
    """Sums over each of ``groups`` equal blocks of channels."""
    return values.unflatten(-1, (groups, -1)).sum(-1)


def corner_products(
    maps: Float[Tensor, "batch pair member height width channel"], groups: int
) -> Float[Tensor, "batch pair member row group"]:
    """Group-wise scalar products of the four cells right of and below each cell, itself included: nine rows a cell.

    With a, b, c, d for the four cells, the looked-up feature is (1-v)(1-u) a + (1-v)u b + v(1-u) c + vu d, and its
    squared length is a quadratic polynomial in u and in v. Its coefficients, nine numbers a group, are computed once
    per set of views, in the place of all channels at every sample.
    """
    height, width = maps.shape[3:5]
    a = maps
    b = torch.cat([a[..., 1:, :], a[..., -1:, :]], -2) if width > 1 else a
    c, d = (torch.cat([m[..., 1:, :, :], m[..., -1:, :, :]], -3) if height > 1 else m for m in (a, b))

    def dot(first: Tensor, second: Tensor) -> Float[Tensor, "batch pair member height width group"]:
        return group_sums(first * second, groups)

    rows = [
        [dot(a, a), 2 * dot(a, b), dot(b, b)],
        [2 * dot(a, c), 2 * (dot(a, d) + dot(b, c)), 2 * dot(b, d)],
        [dot(c, c), 2 * dot(c, d), dot(d, d)],
    ]
    return torch.stack([coefficient for row in rows for coefficient in row], -2).flatten(3, 5)


def pair_similarities(
    maps: PairMaps, reprojection: Reprojection, groups: tuple[int, int], behaviour: Behaviour
) -> Float[Tensor, "batch pair point group"]:
    """Group-wise similarity of every pair at every point: the coarse map's groups, then the fine map's."""
    reprojection = with_taps(reprojection, maps, behaviour)
    similarities = []
    for level, count in enumerate(groups):
        scale = maps.scales[level]
        if reprojection.taps is not None:
            products = None if maps.products is None else maps.products[level]
            similarities.append(_similarities_by_taps(scale, products, *reprojection.taps[level], count))
        else:
            of_pairs = reprojection.pixels[:, pair_index(reprojection.pixels.shape[1], scale.device)]
            size = (scale.shape[4], scale.shape[3])
            features = lookup_pairs(scale, behaviour.map_positions(of_pairs, maps.padded_size, size))
            similarities.append(groupwise_cosine(features[:, :, 0], features[:, :, 1], count))
    return torch.cat(similarities, -1)


def _similarities_by_taps(
    maps: Float[Tensor, "batch pair member height width channel"],
    products: Float[Tensor, "batch pair member row group"] | None,
    linear: Taps,
    quadratic: Taps,
    groups: int,
) -> Float[Tensor, "batch pair point group"]:
    """For the CPU: map by map, so that what is looked up is still in the cache when it is multiplied.

    A view's taps serve its maps of all pairs. ``products``: of the maps (``corner_products``), or None.
    """
    batch, views = linear.rows.shape[:2]
    # ``unbind``, as the gradient of an indexed map would be as large as all maps together
    tables = iter(maps.flatten(3, 4).flatten(0, 2).unbind())
    cosines = []
    for scene in range(batch):
        for pair, members in enumerate(view_pairs(views)):
            of_first, of_second = next(tables), next(tables)
            taps = [linear[scene, view] for view in members]
            if products is None:
                both = weighted_rows(of_first, taps[0]), weighted_rows(of_second, taps[1])
                cosines.append(groupwise_cosine(*both, groups))
                continue
            squares, others = (
                weighted_rows(products[scene, pair, member], quadratic[scene, view])
                for member, view in enumerate(members)
            )
            parts = zip(*(part.split(CACHED_POINTS) for part in taps), strict=True)
            dots = torch.cat(
                [
                    group_sums(weighted_rows(of_first, one).mul_(weighted_rows(of_second, other)), groups)
                    for one, other in parts
                ]
            )
            # The bound holds by itself but for rounding, where neighbouring cells cancel almost entirely.
            cosines.append(dots.mul_(squares.mul_(others).clamp_min_(1e-16).rsqrt_()).clamp_(-1, 1))
    return torch.stack(cosines).unflatten(0, (batch, -1))


def matching_cue(
    maps: PairMaps, reprojection: Reprojection, groups: tuple[int, int], behaviour: Behaviour
) -> Float[Tensor, "batch point group"]:
    """Similarity of the pairs, averaged over the pairs that count at each point.

    On a CPU and with numba installed point by point in compiled code, which keeps only its inputs for the backward
    pass.
    """
    visible = reprojection.visible
    first, second = visible[:, pair_index(visible.shape[1], visible.device)].unbind(2)
    weights = behaviour.pair_weights(first, second)
    kernels = gradients.chosen(*maps.scales, reprojection.pixels)
    if kernels is not None:
        cues = []
        for scale, count in zip(maps.scales, groups, strict=True):
            size = (scale.shape[4], scale.shape[3])
            positions = behaviour.map_positions(reprojection.pixels, maps.padded_size, size)
            cues.append(kernels.match_pairs(scale, positions, weights, count))
        return torch.cat(cues, -1)
    similarities = pair_similarities(maps, reprojection, groups, behaviour)
    return (weights[..., None] * similarities).sum(1)
