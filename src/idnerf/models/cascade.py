"""The `cascade` configuration, our default: coarse frustum volume, few samples, blended colours, refinement.

source images --FeaturePyramid--> PyramidFeatures                      once per set of source views
target tile   --FrustumVolume---> DepthDistribution at 1/4             once per tile
              --FineSamples-----> weights along the ray                8 samples a ray
              --ViewBlending----> blended colour
              --ImageRefinement-> colour, confidence
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from idnerf.errors import InputError
from idnerf.geometry.cameras import crop
from idnerf.models.feature_pyramid import FeaturePyramid, PyramidFeatures
from idnerf.models.fine_samples import FineOutput, FineSamples
from idnerf.models.frustum_volume import DepthDistribution, FrustumVolume
from idnerf.models.image_refinement import ImageRefinement, confidence_of
from idnerf.models.view_blending import ViewBlending
from idnerf.types import Cameras, RenderOutput, Views

Quality = Literal["full", "fast"]


def flag(field: str) -> str:
    """A field's name on the command line."""
    return field.replace("_", "-")


@dataclass(frozen=True)
class CascadeConfig:
    """Sizes of the cascade. Every N >= 2 of source views and every image size share one set of weights."""

    pyramid_widths: tuple[int, int, int, int, int] = (16, 32, 64, 96, 128)
    """Encoder channels at scales 1, 1/2, 1/4, 1/8, 1/16."""
    coarse_channels: int = 32
    """Matching features at 1/4."""
    coarse_groups: int = 8
    """Groups of the coarse group-wise similarity."""
    fine_channels: int = 12
    """Matching features at full resolution (with the colour they fill 15 numbers, one cache line)."""
    fine_groups: int = 3
    """Groups of the fine group-wise similarity."""
    volume_widths: tuple[int, ...] = (16, 32, 48, 64)
    """3D U-Net channels at strides 1, 2, 4, 8 of the coarse volume."""
    voxel_channels: int = 8
    """Features that the coarse volume hands to the samples."""
    token_width: int = 32
    """Channels of a sample token."""
    blend_width: int = 16
    """Hidden channels of the per-view blending weights."""
    refinement_widths: tuple[int, int, int] = (32, 48, 64)
    """Image-space refinement channels at scales 1, 1/2, 1/4."""
    planes: int = 48
    """Coarse inverse depths, quality `full`."""
    samples: int = 8
    """Samples per ray, quality `full`."""
    planes_fast: int = 32
    """Coarse inverse depths, quality `fast`."""
    samples_fast: int = 4
    """Samples per ray, quality `fast`."""

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            widths = value if isinstance(value, list | tuple) else [value]
            if not widths or min(widths) < 1:
                raise InputError(f"--model.cascade.{flag(name)}: expected 1 or more, got {value}")
        for part in ("coarse", "fine"):
            channels, groups = getattr(self, f"{part}_channels"), getattr(self, f"{part}_groups")
            if channels % groups:
                raise InputError(
                    f"--model.cascade.{part}-groups: expected a divisor of --model.cascade.{part}-channels {channels}, "
                    f"got {groups}"
                )


@dataclass(frozen=True)
class CascadeFeatures:
    """What is computed once per set of source views."""

    pyramid: PyramidFeatures
    cameras: Cameras


@dataclass(frozen=True)
class CascadeOutput:
    """Every stage's result for a target tile, for the losses; ``render`` is what a user sees."""

    render: RenderOutput
    blended: Float[Tensor, "batch 3 height width"]
    fine: FineOutput
    distribution: DepthDistribution
    error_scale: Float[Tensor, "batch height width"]


class Cascade(nn.Module):
    """Feed-forward view synthesis in the target camera's frustum."""

    tile_stride = 16
    """Tiles are computed at multiples of this size and cut back."""

    def __init__(self, config: CascadeConfig):
        super().__init__()
        self.config = config
        c = config
        self.encoder = FeaturePyramid(
            c.pyramid_widths, c.coarse_channels, c.coarse_groups, c.fine_channels, c.fine_groups
        )
        self.volume = FrustumVolume(c.coarse_channels, c.coarse_groups, c.volume_widths, c.voxel_channels)
        self.samples = FineSamples(c.fine_channels, c.fine_groups, c.voxel_channels, c.token_width)
        self.blending = ViewBlending(c.fine_channels, c.token_width, c.blend_width)
        self.refinement = ImageRefinement(c.token_width, c.refinement_widths)

    def encode(self, source: Views) -> CascadeFeatures:
        """Args: source views [batch view]."""
        if source.cameras.shape[1] < 2:
            raise InputError(f"expected at least 2 source views, got {source.cameras.shape[1]}: give more photos")
        return CascadeFeatures(self.encoder(source.images), source.cameras)

    def infer_latent(self, features: CascadeFeatures, target: Cameras) -> None:
        """The target-view latent (METHOD: stage 2); this configuration has none yet."""
        return None

    def forward(
        self,
        features: CascadeFeatures,
        target: Cameras,
        *,
        quality: Quality = "full",
        generator: torch.Generator | None = None,
    ) -> CascadeOutput:
        """All stages for a target tile [batch]; ``generator`` jitters the samples (training)."""
        c = self.config
        planes, samples = (c.planes, c.samples) if quality == "full" else (c.planes_fast, c.samples_fast)
        width, height = target.size
        padded = (width + -width % self.tile_stride, height + -height % self.tile_stride)
        tile = crop(target, 0, 0, padded)
        distribution = self.volume(features.pyramid, features.cameras, tile, planes)
        fine = self.samples(features.pyramid, features.cameras, tile, distribution, samples, generator)
        blended, disagreement = self.blending(fine, features.cameras, tile)
        rgb, scale = self.refinement(fine, blended, disagreement)
        near, far = tile.near[:, None, None], tile.far[:, None, None]
        output = RenderOutput(
            rgb=rgb,
            depth=1 / (1 / near + fine.position * (1 / far - 1 / near)),
            opacity=fine.opacity,
            confidence=confidence_of(scale),
        )
        return CascadeOutput(output.map(lambda x: x[..., :height, :width]), blended, fine, distribution, scale)

    def render_tile(self, features: CascadeFeatures, target: Cameras, *, quality: Quality = "full") -> RenderOutput:
        """Colour in [0, 1], depth, opacity and confidence of a target tile [batch]."""
        output = self(features, target, quality=quality).render
        return RenderOutput(output.rgb.clamp(0, 1), output.depth, output.opacity, output.confidence)
