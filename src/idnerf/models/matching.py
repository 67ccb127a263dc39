"""Reprojection and matching: what the source views show at points in space, and how much pairs agree.

MatchNeRF (arXiv 2304.12294), section 3.2. Points are a flat axis; the matching cue is a mean over pairs, so
its width does not depend on the number of views.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from idnerf.geometry.projection import bilinear_lookup, project
from idnerf.models.behaviour import Behaviour
from idnerf.models.gmflow import PairMaps, view_pairs
from idnerf.types import Cameras


@dataclass(frozen=True)
class Reprojection:
    """Where points land in the source views.

    Attributes:
        pixels: positions in each view, centres at +0.5; meaningless where not visible.
        visible: in front of the camera and inside its image.
    """

    pixels: Float[Tensor, "batch view point 2"]
    visible: Bool[Tensor, "batch view point"]


def reproject(points: Float[Tensor, "batch point 3"], sources: Cameras, behaviour: Behaviour) -> Reprojection:
    """World points into every source view; ``sources`` is [batch view]."""
    everywhere = points[:, None].expand(-1, sources.shape[1], -1, -1)
    pixels, depth = project(everywhere, sources)
    return Reprojection(pixels, behaviour.visible(pixels, depth, sources.size))


def lookup_colours(
    images: Float[Tensor, "batch view height width 3"], pixels: Float[Tensor, "batch view point 2"]
) -> Float[Tensor, "batch view point 3"]:
    """Bilinear colours of channels-last images, border values outside."""
    colours = bilinear_lookup(images.flatten(0, 1), pixels.flatten(0, 1))
    return colours.unflatten(0, images.shape[:2])


def lookup_pairs(
    maps: Float[Tensor, "batch pair member height width channel"],
    positions: Float[Tensor, "batch pair member point 2"],
) -> Float[Tensor, "batch pair member point channel"]:
    """Features of both members of every pair, one bilinear tap at positions in cells (centres at +0.5)."""
    features = bilinear_lookup(maps.flatten(0, 2), positions.flatten(0, 2))
    return features.unflatten(0, maps.shape[:3])


def groupwise_cosine(
    first: Float[Tensor, "*batch channel"], second: Float[Tensor, "*batch channel"], groups: int
) -> Float[Tensor, "*batch group"]:
    """Cosine similarity in each of ``groups`` equal blocks of channels; 0 where a block is zero."""
    first, second = first.unflatten(-1, (groups, -1)), second.unflatten(-1, (groups, -1))
    squares = (first * first).sum(-1) * (second * second).sum(-1)
    return (first * second).sum(-1) * squares.clamp_min(1e-16).rsqrt()


def pair_similarities(
    maps: PairMaps,
    pixels: Float[Tensor, "batch view point 2"],
    groups: tuple[int, int],
    behaviour: Behaviour,
) -> Float[Tensor, "batch pair point group"]:
    """Group-wise similarity of every pair at every point: the coarse map's groups, then the fine map's."""
    pairs = torch.tensor(view_pairs(pixels.shape[1]), device=pixels.device)
    of_pairs = pixels[:, pairs]
    similarities = []
    for scale, count in zip(maps.scales, groups, strict=True):
        size = (scale.shape[4], scale.shape[3])
        features = lookup_pairs(scale, behaviour.map_positions(of_pairs, maps.padded_size, size))
        similarities.append(groupwise_cosine(features[:, :, 0], features[:, :, 1], count))
    return torch.cat(similarities, -1)


def matching_cue(
    maps: PairMaps, reprojection: Reprojection, groups: tuple[int, int], behaviour: Behaviour
) -> Float[Tensor, "batch point group"]:
    """Similarity of the pairs, averaged over the pairs that count at each point."""
    similarities = pair_similarities(maps, reprojection.pixels, groups, behaviour)
    visible = reprojection.visible
    first, second = (list(members) for members in zip(*view_pairs(visible.shape[1]), strict=True))
    weights = behaviour.pair_weights(visible[:, first], visible[:, second])
    return (weights[..., None] * similarities).sum(1)
