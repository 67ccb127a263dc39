"""The middle stage of the cascade: a few hypotheses per half-resolution pixel sharpen the coarse distribution.

coarse distribution --quantiles--> hypotheses at 1/2 --project--> features, colours of every view
  --matching + coarse voxel features--> tokens --3D U-Net--> weights of the hypotheses, tokens for the fine stage

Cascades of cost volumes: Gu et al., CasMVSNet (arXiv 1912.06378). Theirs narrow one interval around the expected depth;
here the hypotheses are quantiles, so that a pixel on a depth edge keeps both surfaces.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from idnerf.geometry.projection import frustum_homography, homography_rays
from idnerf.geometry.rays import pixel_centers
from idnerf.models.activation import activate
from idnerf.models.feature_pyramid import PyramidFeatures, ResidualBlock, start_at_zero
from idnerf.models.frustum_volume import DepthDistribution, VoxelLookup
from idnerf.models.view_matching import match_views
from idnerf.rendering.sampling import sample_bins, sample_histogram
from idnerf.types import Cameras

HYPOTHESES_PER_CHUNK = 4
"""Hypotheses looked up at once when no gradient is wanted."""


@dataclass(frozen=True)
class MiddleOutput:
    """A depth distribution per half-resolution pixel, over bins of its own.

    Attributes:
        edges: of the bins, as positions in [0, 1] of inverse depth (0 at near), ascending from 0 to 1.
        log_weights: of the bins; exp sums to 1 over the bins.
        tokens: of each bin.
    """

    edges: Float[Tensor, "batch edge height2 width2"]
    log_weights: Float[Tensor, "batch bin height2 width2"]
    tokens: Float[Tensor, "batch channel bin height2 width2"]

    def draw(
        self, size: tuple[int, int], quantiles: Float[Tensor, "*#batch ray sample"]
    ) -> tuple[Float[Tensor, "batch sample height width"], Int64[Tensor, "batch sample height width"]]:
        """Positions of a full-resolution tile ``size`` (height, width), and the row of ``rows`` each one lies in.

        A pixel takes the distribution of the cell that it belongs to, of 2x2 pixels or more: mixing neighbours would
        mix surfaces across depth edges. ``quantiles`` in [0, 1] ascend along the last axis; rays are row by row.
        """
        batch, bins, height2, width2 = self.log_weights.shape
        cell = torch.arange(height2 * width2, device=self.edges.device).unflatten(0, (height2, width2))
        side = -(-size[0] // height2)
        cell = cell.repeat_interleave(side, 0).repeat_interleave(side, 1)[: size[0], : size[1]].flatten()
        edges = self.edges.flatten(2).transpose(1, 2)[:, cell]
        weights = self.log_weights.exp().flatten(2).transpose(1, 2)[:, cell]
        positions, index = sample_bins(edges, weights, quantiles)
        first = torch.arange(batch, device=cell.device)[:, None, None] * bins
        rows = (first + index) * (height2 * width2) + cell[:, None]
        return positions.transpose(1, 2).unflatten(-1, size), rows.transpose(1, 2).unflatten(-1, size)

    def rows(self) -> Float[Tensor, "row channel_and_weight"]:
        """Token and log-weight of every bin, batch by batch, bin by bin: as the tokens lie in memory."""
        weights = (0.2 * self.log_weights).to(self.tokens.dtype)
        return torch.cat([self.tokens.movedim(1, -1), weights[..., None]], -1).flatten(0, 3)


class MiddleStage(nn.Module):
    """Matching and a small 3D U-Net over the hypotheses of a half-resolution tile.

    Args:
        channels, groups: matching features at 1/2.
        voxel_channels: features of the coarse volume.
        widths: channels at 1/2 and 1/4.
    """

    scale = 2

    def __init__(self, channels: int, groups: int, voxel_channels: int, widths: tuple[int, int]):
        super().__init__()
        self.channels, self.groups = channels, groups
        w0, w1 = widths
        # pair similarity (mean, max), mean of features and colour, spread of colour, voxel features, log-probability,
        # share of views that see the hypothesis, position, width of its bin
        self.embed = nn.Linear(2 * groups + channels + 6 + voxel_channels + 4, w0)
        self.block0 = ResidualBlock(w0, 3)
        self.down = nn.Conv2d(w0, w1, 4, stride=2, padding=1)  # within a hypothesis
        self.block1 = ResidualBlock(w1, 3)
        self.lateral = nn.Conv2d(w1, w0, 1)
        self.block2 = ResidualBlock(w0, 3)
        self.head = nn.Linear(w0, 1)
        start_at_zero(self.head)
        self.similarity_gain = nn.Parameter(torch.tensor(2.0))

    def forward(
        self,
        features: PyramidFeatures,
        source: Cameras,
        target: Cameras,
        distribution: DepthDistribution,
        hypotheses: int,
        generator: torch.Generator | None = None,
    ) -> MiddleOutput:
        """Args: ``source`` [batch view], ``target`` [batch] of a size that is a multiple of 4; ``generator`` jitters
        where in its bin a hypothesis is looked at (training)."""
        size = (target.height // self.scale, target.width // self.scale)
        edges, looked_at = self._draw(distribution, size, hypotheses, generator)
        centers = pixel_centers((size[1], size[0]), target.device) * self.scale
        voxels, pixels = VoxelLookup(distribution, target.height), centers.reshape(-1, 2)
        A, b = frustum_homography(target, source)
        rays = homography_rays(A, pixels)  # batch view pixel 3
        chunk = hypotheses if torch.is_grad_enabled() else HYPOTHESES_PER_CHUNK
        tokens, agreements = [], []
        bin_widths = edges[:, 1:] - edges[:, :-1]
        for part, bin_width in zip(looked_at.split(chunk, 1), bin_widths.split(chunk, 1), strict=True):
            cues, similarity = self._cues(features, source, target, rays, b, part, bin_width, voxels.at(centers, part))
            tokens.append(self.embed(cues).unflatten(1, (-1, *size)))
            agreements.append(similarity.unflatten(1, (-1, *size)))
        x = self._mix(torch.cat(tokens, 1).permute(0, 4, 1, 2, 3))
        logits = self.head(activate(x).movedim(1, -1))[..., 0].float()
        logits = logits + self.similarity_gain * torch.cat(agreements, 1)
        # gradients of rows that several samples take are added up in float32
        return MiddleOutput(edges, F.log_softmax(logits, 1), x.float() if torch.is_grad_enabled() else x)

    def _draw(
        self, distribution: DepthDistribution, size: tuple[int, int], bins: int, generator: torch.Generator | None
    ) -> tuple[Float[Tensor, "batch edge height2 width2"], Float[Tensor, "batch bin height2 width2"]]:
        """Bins of equal coarse probability, and a position in each: its median, or anywhere."""
        with torch.no_grad():
            probabilities = F.interpolate(
                distribution.log_probabilities.exp(), size=size, mode="bilinear", align_corners=False
            )
            histogram = probabilities.flatten(2).transpose(1, 2)
            where = torch.arange(bins, device=histogram.device).add(0.5).expand(*histogram.shape[:2], -1)
            if generator is not None:
                jitter = torch.rand(where.shape, generator=generator, device=histogram.device)
                where = where + 0.5 * (jitter - 0.5)
            inner = torch.arange(1, bins, device=histogram.device).expand(*histogram.shape[:2], -1)
            found = sample_histogram(histogram, torch.cat([where, inner], -1) / bins)
            looked_at, inner = found.split([bins, bins - 1], -1)
            ends = torch.zeros_like(where[..., :1]), torch.ones_like(where[..., :1])
            edges = torch.cat([ends[0], inner, ends[1]], -1)
        return edges.transpose(1, 2).unflatten(-1, size), looked_at.transpose(1, 2).unflatten(-1, size)

    def _cues(
        self,
        features: PyramidFeatures,
        source: Cameras,
        target: Cameras,
        rays: Float[Tensor, "batch view pixel 3"],
        b: Float[Tensor, "batch view 3"],
        positions: Float[Tensor, "batch bin height2 width2"],
        bin_widths: Float[Tensor, "batch bin height2 width2"],
        voxels: Float[Tensor, "batch point voxel"],
    ) -> tuple[Float[Tensor, "batch point cue"], Float[Tensor, "batch point"]]:
        """What the tokens are made of, and the mean similarity."""
        assert features.middle is not None
        near, far = target.near[:, None, None], target.far[:, None, None]
        inverse_depths = 1 / near + positions.flatten(2) * (1 / far - 1 / near)
        found = match_views(
            features.middle, source.size, rays, b, inverse_depths, self.scale, self.channels, self.groups
        )
        cues = [
            found.cues,
            voxels,
            found.share,
            positions.flatten(1)[..., None],
            (bin_widths.flatten(1)[..., None] + 1e-4).log() * 0.2,
        ]
        return torch.cat(cues, -1), found.agreement

    def _mix(
        self, x: Float[Tensor, "batch channel bin height2 width2"]
    ) -> Float[Tensor, "batch channel bin height2 width2"]:
        """The U-Net: neighbouring hypotheses at 1/2, and at 1/4 for context."""
        x = self.block0(x)
        batch, bins = x.shape[0], x.shape[2]

        def by_hypothesis(volume: Tensor) -> Tensor:
            return volume.transpose(1, 2).flatten(0, 1)

        below = self.down(by_hypothesis(activate(x))).unflatten(0, (batch, bins)).transpose(1, 2)
        below = self.lateral(by_hypothesis(activate(self.block1(below))))
        above = F.interpolate(below, size=x.shape[3:], mode="bilinear", align_corners=False)
        return self.block2(x + above.unflatten(0, (batch, bins)).transpose(1, 2))
