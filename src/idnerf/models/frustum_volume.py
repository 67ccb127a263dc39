"""The coarse stage: a volume in the target camera's frustum, matched over source views, gives depth distributions.

    source features --homography per plane--> pair similarity, means --linear--> volume --3D U-Net--> logits, features

The volume lies at 1/4 of the target's resolution and has any number of planes, evenly spaced in inverse depth: the
network is convolutional along all three axes.
"""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from idnerf.compiled import gradients
from idnerf.geometry.projection import frustum_homography, homography_rays, trilinear_lookup
from idnerf.geometry.rays import pixel_centers
from idnerf.models.activation import activate, start_at_unit_gain
from idnerf.models.feature_pyramid import PyramidFeatures, ResidualBlock
from idnerf.models.plane_conv import PlaneConv
from idnerf.models.view_matching import Matching, match_views
from idnerf.rendering.sampling import inverse_depth_planes
from idnerf.types import Cameras

HALVED_SHARE = 0.4
"""Of the weights of similarity: what matching on the next smaller photos starts with."""
UNSURE = (0.57, 0.72)
"""Entropies, of the largest possible, between which a cell changes from sure to unsure of its depth. On three of the
photos that weights are chosen by half of the cells lie below 0.3; the printer's plain panels, above 0.7."""
MIRRORED_AXES: tuple[tuple[int, ...], ...] = ((), (-2,), (-2, -1), (-1,))
"""Axes of a volume along which its first, second, ... mirror image is reversed."""
PLANES_PER_CHUNK = 8
"""Planes looked up at once when no gradient is wanted: keeps the looked-up features to tens of megabytes."""


@dataclass(frozen=True)
class DepthDistribution:
    """What the coarse stage knows of a target tile, at 1/4 of its resolution, plane 0 the nearest.

    Attributes:
        log_probabilities: over planes; exp sums to 1 over the plane axis.
        features: of each voxel.
    """

    log_probabilities: Float[Tensor, "batch plane height4 width4"]
    features: Float[Tensor, "batch channel plane height4 width4"]

    def mixed(self, other: "DepthDistribution", share: float) -> "DepthDistribution":
        """Unsure cells take ``share`` of their probabilities from ``other``, which has as many planes and any size.

        How unsure a cell is, is the entropy of its distribution over the largest that there is: from nothing to all of
        the share between the two ``UNSURE``. No gradient flows through that. Voxel features stay.
        """
        log_probabilities = self.log_probabilities
        own = log_probabilities.exp()
        entropy = -(own * log_probabilities).detach().sum(1, keepdim=True) / math.log(max(own.shape[1], 2))
        taken = share * ((entropy - UNSURE[0]) / (UNSURE[1] - UNSURE[0])).clamp(0, 1)
        others = F.interpolate(other.log_probabilities.exp(), own.shape[2:], mode="bilinear", align_corners=False)
        return DepthDistribution(torch.lerp(own, others, taken).clamp_min(1e-12).log(), self.features)

    def middle_half(self) -> "DepthDistribution":
        """Of rows and columns the middle half; their numbers are multiples of 4."""
        height, width = self.log_probabilities.shape[2:]
        window = (..., slice(height // 4, height * 3 // 4), slice(width // 4, width * 3 // 4))
        return DepthDistribution(self.log_probabilities[window], self.features[window])


def mirrored(volume: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The volume, reversed along these axes."""
    return volume.flip(axes) if axes else volume


class VoxelLookup:
    """Coarse voxel features and log-probability at any point of a tile of ``height``; made once per tile."""

    def __init__(self, distribution: DepthDistribution, height: int):
        log_probabilities = distribution.log_probabilities
        self.planes, self.cell_side = log_probabilities.shape[1], -(-height // log_probabilities.shape[2])
        cells = torch.cat([distribution.features, log_probabilities[:, None] * 0.2], 1)
        self.cells = cells.permute(0, 2, 3, 4, 1).contiguous()

    def at(
        self, pixels: Float[Tensor, "height width 2"], positions: Float[Tensor, "batch sample height width"]
    ) -> Float[Tensor, "batch point channel"]:
        """At ``pixels`` of the full-resolution tile and ``positions`` in [0, 1] of inverse depth, sample by sample."""
        cell = pixels / self.cell_side
        compiled = gradients.chosen(self.cells, cell, positions)
        if compiled is not None:
            return compiled.look_up_voxels(self.cells, cell.flatten(0, 1), positions.flatten(2))
        cell = cell.expand(*positions.shape, 2)
        where = torch.cat([cell, (positions * self.planes)[..., None]], -1)
        return trilinear_lookup(self.cells, where.flatten(1, 3))


class VolumeUNet(nn.Module):
    """Light 3D U-Net; widths at strides 1, 2, 4, 8. Sizes need not divide: upsampling goes to the skip's size."""

    def __init__(self, widths: tuple[int, ...]):
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(w, 3) for w in widths)
        self.downs = nn.ModuleList(PlaneConv(a, b, stride=2) for a, b in itertools.pairwise(widths))
        self.laterals = nn.ModuleList(nn.Conv3d(b, a, 1) for a, b in itertools.pairwise(widths))
        self.fuses = nn.ModuleList(ResidualBlock(w, 3) for w in widths[:-1])
        self.widths, self.more = widths, nn.ModuleList()

    def add_blocks(self, counts: tuple[int, ...]) -> None:
        """So many further blocks on the way down at strides 1, 2, ...; they start as no change."""
        for width, count in zip(self.widths, counts, strict=False):
            self.more.append(nn.Sequential(*(ResidualBlock(width, 3) for _ in range(count))))
        start_at_unit_gain(self.more)

    def forward(self, x: Float[Tensor, "batch channel plane height width"]) -> Tensor:
        skips: list[Tensor] = []
        for level, block in enumerate(self.blocks):
            x = block(self.downs[level - 1](activate(x)) if level else x)
            x = self.more[level](x) if level < len(self.more) else x
            skips.append(x)
        for level in reversed(range(len(self.fuses))):
            up = F.interpolate(self.laterals[level](activate(x)), size=skips[level].shape[2:], mode="nearest")
            x = self.fuses[level](skips[level] + up)
        return x


class FrustumVolume(nn.Module):
    """Builds the target-frustum volume and turns it into a depth distribution per 1/4-resolution pixel."""

    scale = 4

    def __init__(self, coarse_channels: int, coarse_groups: int, widths: tuple[int, ...], feature_channels: int):
        super().__init__()
        self.channels, self.groups = coarse_channels, coarse_groups
        # pair similarity (mean, max), colour-like mean features, their spread per group, share of views that see it
        self.embed = nn.Linear(2 * coarse_groups + coarse_channels + coarse_groups + 2, widths[0])
        self.unet = VolumeUNet(widths)
        # the network refines a plane sweep: without this head start it takes thousands of steps to discover matching
        self.similarity_gain = nn.Parameter(torch.tensor(10.0))
        self.head = PlaneConv(widths[0], 1 + feature_channels)
        self.from_halved = nn.ModuleList()
        self.halved_gains = nn.ParameterList()

    def add_halved(self, halvings: int) -> None:
        """Matching on the halved photos' maps too. Each starts with a share of what the larger photos' similarity
        weighs in the embedding and the logits, which without any training is better than nothing (docs/cascade.md)."""
        for _ in range(halvings):
            self.from_halved.append(nn.Linear(2 * self.groups, self.embed.out_features, bias=False))
            self.halved_gains.append(nn.Parameter(torch.zeros(())))
        self.share_similarity(range(halvings))

    @torch.no_grad()
    def share_similarity(self, halvings: Iterable[int]) -> None:
        """Hand ``HALVED_SHARE`` of the weights of similarity from one size of the photos to the next smaller one."""
        weights = [self.embed.weight[:, : 2 * self.groups], *(layer.weight for layer in self.from_halved)]
        gains = [self.similarity_gain, *self.halved_gains]
        for number in halvings:
            for larger, smaller in (weights[number : number + 2], gains[number : number + 2]):
                smaller.copy_(HALVED_SHARE * larger)
                larger.mul_(1 - HALVED_SHARE)

    def forward(
        self, features: PyramidFeatures, source: Cameras, target: Cameras, planes: int, mirrorings: int = 1
    ) -> DepthDistribution:
        """Args: ``source`` [batch view], ``target`` [batch] whose size is a multiple of 4; ``mirrorings``, 1 to 4: of
        so many mirror images of the volume the network's mean is taken."""
        width4, height4 = target.width // self.scale, target.height // self.scale
        inverse_depths = inverse_depth_planes(target.near, target.far, planes)
        pixels = pixel_centers((width4, height4), target.device).reshape(-1, 2) * self.scale
        A, b = frustum_homography(target, source)
        rays = homography_rays(A, pixels)  # batch view pixel 3
        chunk = planes if torch.is_grad_enabled() else PLANES_PER_CHUNK
        embedded, similarities = [], []
        for part in inverse_depths.split(chunk, dim=1):
            found = self._match(features, source, rays, b, part)
            tokens, similarity = self.embed(found.cues), self.similarity_gain * found.agreement
            for number, (layer, gain) in enumerate(zip(self.from_halved, self.halved_gains, strict=True)):
                halved = self._match(features, source, rays, b, part, number + 1)
                tokens = tokens + layer(halved.cues)
                similarity = similarity + gain * halved.agreement
            embedded.append(tokens.unflatten(1, (-1, height4, width4)))
            similarities.append(similarity.unflatten(1, (-1, height4, width4)))
        x = self._filtered(torch.cat(embedded, 1).permute(0, 4, 1, 2, 3), mirrorings)
        logits = x[:, 0] + torch.cat(similarities, 1)
        return DepthDistribution(F.log_softmax(logits, dim=1), x[:, 1:])

    def _filtered(
        self, x: Float[Tensor, "batch channel plane height4 width4"], mirrorings: int
    ) -> Float[Tensor, "batch logit_and_feature plane height4 width4"]:
        """Logits and features of the embedded volume: the mean over its mirror images, each turned back."""
        images = MIRRORED_AXES[:mirrorings]
        total: Tensor | None = None
        for axes in images:
            found = mirrored(self.head(activate(self.unet(mirrored(x, axes)))), axes).float()
            total = found if total is None else total.add_(found)
        assert total is not None
        return total if len(images) == 1 else total / len(images)

    def _match(
        self,
        features: PyramidFeatures,
        source: Cameras,
        rays: Float[Tensor, "batch view pixel 3"],
        b: Float[Tensor, "batch view 3"],
        inverse_depths: Float[Tensor, "batch plane"],
        halvings: int = 0,
    ) -> Matching:
        """On the photos; on those halved so often, similarity alone."""
        maps = features.halved[halvings - 1] if halvings else features.coarse
        scale, channels, groups = self.scale * 2**halvings, self.channels, self.groups
        depths, alone = inverse_depths[..., None], halvings > 0
        return match_views(maps, source.size, rays, b, depths, scale, channels, groups, only_similarity=alone)
