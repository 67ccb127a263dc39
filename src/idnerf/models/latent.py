"""Latent inference: the target-view latent z_tv from the source photos and the cameras alone, in two stages.

stage 1, once per set of sources   photo + ray map of every view --convolutions, merged over views--> scene latent
stage 2, once per target           scene latent + ray map of the target --convolutions--> z_tv

z_tv lies in the target camera's image plane. Score distillation pulls it towards what a diffusion model expects to see
there (``training.score_distillation``); the renderer reads it as one more token beside those of the views. Ray maps are
relative to the target camera, lengths in units of its near: neither the scene's unit nor its frame matters.

Two networks with one face: ``ImageLatentInference`` is the paper's, ``FrustumLatentInference`` the cascade's.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from idnerf.errors import InputError
from idnerf.geometry.cameras import crop, invert_rigid
from idnerf.geometry.precision import full_precision
from idnerf.geometry.projection import bilinear_lookup, project, scaled, visible
from idnerf.geometry.rays import image_rays, inverse_intrinsics, pixel_centers, rays_at_pixels
from idnerf.models.view_matching import masked_mean_and_variance
from idnerf.rendering.opponent_axes import OPPONENT_AXES, OPPONENT_DEVIATIONS
from idnerf.rendering.sampling import inverse_depth_planes
from idnerf.types import Cameras

LATENT_CHANNELS = 4
"""As a Stable Diffusion latent has."""
LATENT_STRIDE = 8
"""Pixels per cell of a latent that follows the target's size."""
LATENT_MIDDLE = 0.5
"""z = 0.5 is the middle of a prior, which sees 2 z - 1: latents start there."""
GLOBAL_CELLS = 16
"""A side of the grid that the `global` query pools the latent to: 16 x 16 cells, 256 numbers a channel."""

UNMATCHED_VARIANCE = 0.08
"""Colour variance (colours in [-1, 1]) assumed where fewer than two views look."""
FIRST_SHARPNESS = 100.0
"""By which the variance of agreeing views weighs planes before any training."""

LatentQuery = Literal["none", "global", "pixel"]
"""How a sample reads the latent: not at all; all of it as one vector (the public code); at its ray's own pixel."""


def check_latent_options(query: LatentQuery, view_refinement: bool, size: tuple[int, int] | None, flag: str) -> None:
    """Raise InputError for a latent that nothing could read, or an empty one; ``flag`` begins the options' names."""
    if query != "none" and not view_refinement:
        raise InputError(
            f"--{flag}.latent-query {query}: expected --{flag}.view-refinement with it, for the latent is a token of it"
        )
    if size is not None and min(size) < 1:
        raise InputError(f"--{flag}.latent-size: expected 1 or more, got {size[0]} {size[1]}")


@dataclass(frozen=True)
class TargetLatent:
    """z_tv of target views.

    Attributes:
        values: a grid of cells that spans the image of ``cameras`` exactly.
        cameras: [batch] the target cameras, or a crop of them.
    """

    values: Float[Tensor, "batch 4 cells_y cells_x"]
    cameras: Cameras

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in cells."""
        return self.values.shape[3], self.values.shape[2]

    def with_values(self, values: Float[Tensor, "batch 4 cells_y cells_x"]) -> "TargetLatent":
        """The same place with other content: zeros, or another scene's, to measure what the latent does."""
        return replace(self, values=values)

    @full_precision
    def at(self, target: Cameras, pixels: Float[Tensor, "batch ray 2"]) -> Float[Tensor, "batch ray 4"]:
        """Bilinear values at pixels (centres at +0.5) of a crop or another size of the same target cameras."""
        homogeneous = F.pad(pixels, (0, 1), value=1.0)
        moved = homogeneous @ (self.cameras.K @ inverse_intrinsics(target.K)).transpose(-1, -2)
        across, down = (cells / pixels for cells, pixels in zip(self.size, self.cameras.size, strict=True))
        cells = scaled(moved[..., :2], across, down)
        return bilinear_lookup(self.values.permute(0, 2, 3, 1).contiguous(), cells)


def latent_cameras(target: Cameras, size: tuple[int, int] | None) -> tuple[Cameras, tuple[int, int]]:
    """(Cameras that a latent spans, its size in cells): ``size`` over the image, or None for cells of 8 x 8 pixels.

    With None the cameras are padded at the right and the bottom to a whole number of cells.
    """
    if size is not None:
        return target, size
    cells = math.ceil(target.width / LATENT_STRIDE), math.ceil(target.height / LATENT_STRIDE)
    return crop(target, 0, 0, (cells[0] * LATENT_STRIDE, cells[1] * LATENT_STRIDE)), cells


@full_precision
def relative_cameras(source: Cameras, target: Cameras) -> Cameras:
    """``source`` [batch view] in the frame of ``target`` [batch], in units of the target's near."""
    unit = target.near[:, None]
    c2w = invert_rigid(target.c2w)[:, None] @ source.c2w
    centers = c2w[..., :3, 3:] / unit[..., None, None]
    c2w = torch.cat([torch.cat([c2w[..., :3, :3], centers], -1), c2w[..., 3:, :]], -2)
    return Cameras(c2w, source.K, source.size, source.near / unit, source.far / unit)


def ray_maps(cameras: Cameras) -> Float[Tensor, "*batch 6 height width"]:
    """Origin and unit direction of every pixel's ray."""
    rays = image_rays(cameras)
    return torch.cat([rays.origins, rays.directions], -1).movedim(-1, -3)


class ConvBlock(nn.Sequential):
    """3x3 convolution, group normalisation (any batch size, the same in training and evaluation), leaky ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(outputs // 8, outputs), nn.LeakyReLU(0.01)
        )


class LocalConvBlock(nn.Module):
    """3x3 convolution, normalisation over the channels of each pixel, leaky ReLU: no pixel sees the image's size."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, 1, 1)
        self.norm = nn.LayerNorm(outputs)

    def forward(self, x: Float[Tensor, "n inputs h w"]) -> Float[Tensor, "n outputs h w"]:
        x = self.norm(self.conv(x).permute(0, 2, 3, 1))
        return F.leaky_relu(x, 0.01).permute(0, 3, 1, 2)


def latent_head(inputs: int) -> nn.Conv2d:
    """To the four latent channels, starting around the middle of a prior."""
    head = nn.Conv2d(inputs, LATENT_CHANNELS, 1)
    assert head.bias is not None
    nn.init.constant_(head.bias, LATENT_MIDDLE)
    return head


class ImageLatentInference(nn.Module):
    """The paper's network: views meet in their own image planes, cell by cell, wherever they look.

    Widths and strides are the public code's; there, three views are concatenated, here the mean and the variance over
    the views, so that any number of views in any order has one set of weights.

    Args:
        size: (width, height) of z_tv in cells; None: an eighth of the target.
    """

    def __init__(self, size: tuple[int, int] | None) -> None:
        super().__init__()
        self.size = size
        self.per_view = nn.Sequential(ConvBlock(3 + 6, 16, 2), ConvBlock(16, 32), ConvBlock(32, 32))
        self.merged = nn.Sequential(ConvBlock(64, 64, 2), ConvBlock(64, 64, 2), ConvBlock(64, 32))
        self.target = nn.Sequential(
            ConvBlock(32 + 6, 32, 2), ConvBlock(32, 32, 2), ConvBlock(32, 16, 2), ConvBlock(16, 16)
        )
        self.head = latent_head(16)

    def scene_latent(
        self, images: Float[Tensor, "batch view 3 height width"], source: Cameras, target: Cameras
    ) -> Float[Tensor, "batch 32 height8 width8"]:
        """Stage 1: z_s at 1/8 of the source images (in [0, 1]). It depends on the target by the frame of the rays."""
        batch, view = source.shape
        x = torch.cat([images * 2 - 1, ray_maps(relative_cameras(source, target))], 2)
        x = self.per_view(x.flatten(0, 1)).unflatten(0, (batch, view))
        mean = x.mean(1)
        return self.merged(torch.cat([mean, (x - mean[:, None]).square().mean(1)], 1))

    def forward(
        self, images: Float[Tensor, "batch view 3 height width"], source: Cameras, target: Cameras
    ) -> TargetLatent:
        """Both stages: z_tv of [batch] targets from [batch view] sources."""
        cameras, cells = latent_cameras(target, self.size)
        scene = self.scene_latent(images, source, target)
        scene = F.interpolate(scene, size=cameras.size[::-1], mode="bilinear", align_corners=False)
        rays = ray_maps(relative_cameras(cameras[:, None], cameras))[:, 0]
        z = self.head(self.target(torch.cat([scene, rays], 1)))
        return TargetLatent(F.interpolate(z, size=cells[::-1], mode="bilinear", align_corners=False), cameras)


class FrustumLatentInference(nn.Module):
    """The cascade's network: views meet in the target's frustum, on a few planes of inverse depth.

    Photo and encoder features of every view are convolved at 1/4 (stage 1). Every latent cell looks them up on each
    plane, together with the view's ray there; mean and variance over the views that see the point are the scene latent
    in the target's frustum, which is convolved with the target's own ray map (stage 2).

    The sources' colours take a short way besides: blended over the planes by how well the views agree there, they meet
    the last layer as they are, and before any training the latent is these colours: three channels of unit deviation
    along opponent axes, as in the small prior before its training, and a fourth at the middle. The optimizer moves a
    weight by no more than its rate a step, so from small random weights 200 steps of score distillation explained 0.28
    of the true latents' variance (and regressing these very latents 0.25); from this start 0.40 before and 0.56 after.

    The encoder's features are detached: score distillation trains this network and nothing else.

    Args:
        feature_channels: of the encoder's features at 1/4.
        size: (width, height) of z_tv in cells; None: an eighth of the target.
        planes: planes of inverse depth between near and far.
        width: channels of a view on a plane.
    """

    scale = 4
    """Pixels per cell of the encoder's features."""

    def __init__(self, feature_channels: int, size: tuple[int, int] | None, planes: int = 8, width: int = 16) -> None:
        super().__init__()
        self.size, self.planes = size, planes
        self.per_view = nn.Sequential(LocalConvBlock(3 + feature_channels, 32), LocalConvBlock(32, width))
        self.on_plane = nn.Linear(width + 6, width)
        self.target = nn.Sequential(
            LocalConvBlock(planes * (2 * width + 1) + 6 + 3, 64), LocalConvBlock(64, 64), LocalConvBlock(64, 32)
        )
        self.log_sharpness = nn.Parameter(torch.tensor(math.log(FIRST_SHARPNESS)))
        self.head = latent_head(32 + 3)
        with torch.no_grad():
            self.head.weight.zero_()
            self.head.weight[:3, -3:, 0, 0] = OPPONENT_AXES / OPPONENT_DEVIATIONS[:, None] / 2  # z, of 2 z - 1

    def view_maps(
        self,
        images: Float[Tensor, "batch view 3 height width"],
        features: Float[Tensor, "batch view height4 width4 feature"],
    ) -> Float[Tensor, "batch view height4 width4 channel"]:
        """Stage 1, once per set of sources; ``features`` may reach beyond the image at the right and the bottom."""
        batch, view, height4, width4, _ = features.shape
        right, bottom = width4 * self.scale - images.shape[-1], height4 * self.scale - images.shape[-2]
        small = F.avg_pool2d(F.pad(images.flatten(0, 1), (0, right, 0, bottom), mode="replicate"), self.scale)
        colours = small * 2 - 1
        x = torch.cat([colours, features.detach().flatten(0, 1).permute(0, 3, 1, 2)], 1)
        return torch.cat([self.per_view(x), colours], 1).permute(0, 2, 3, 1).contiguous().unflatten(0, (batch, view))

    def forward(
        self, maps: Float[Tensor, "batch view height4 width4 channel"], source: Cameras, target: Cameras
    ) -> TargetLatent:
        """Stage 2: z_tv of [batch] targets from the ``view_maps`` of [batch view] sources."""
        batch, view = source.shape
        cameras, (across, down) = latent_cameras(target, self.size)
        source, cameras_here = relative_cameras(source, cameras), relative_cameras(cameras[:, None], cameras)[:, 0]
        centers = pixel_centers((across, down), maps.device).flatten(0, 1)
        pixels = scaled(centers, cameras.width / across, cameras.height / down).expand(batch, -1, 2)
        rays = rays_at_pixels(cameras_here, pixels)
        depths = 1 / inverse_depth_planes(cameras_here.near, cameras_here.far, self.planes)
        points = rays.directions[:, None] * (depths[..., None] / rays.cos[:, None])[..., None]
        points = points.flatten(1, 2)  # batch plane*cell 3
        everywhere = points[:, None].expand(-1, view, -1, -1)
        positions, in_front = project(everywhere, source)
        seen = visible(positions, in_front, source.size)
        looked_up = bilinear_lookup(maps.flatten(0, 1), positions.flatten(0, 1) / self.scale).unflatten(
            0, (batch, view)
        )
        looked_up, colours = looked_up.split([looked_up.shape[-1] - 3, 3], -1)
        origins = source.centers[:, :, None].expand_as(everywhere)
        directions = F.normalize(everywhere - origins, dim=-1)
        on_plane = F.leaky_relu(self.on_plane(torch.cat([looked_up, origins, directions], -1)), 0.01)
        mean, variance = masked_mean_and_variance(on_plane, seen)
        share = seen.sum(1, dtype=mean.dtype)[..., None] / view
        merged = torch.cat([mean, variance, share], -1).unflatten(1, (self.planes, down, across))
        merged = merged.permute(0, 1, 4, 2, 3).flatten(1, 2)
        own = torch.cat([rays.origins, rays.directions], -1).transpose(1, 2).unflatten(-1, (down, across))
        colour = self.agreed_colour(colours, seen).transpose(1, 2).unflatten(-1, (down, across))
        x = self.target(torch.cat([merged, own, colour], 1))
        values = self.head(torch.cat([x, colour], 1)).float()  # also under bfloat16: score distillation compares them
        return TargetLatent(values, cameras)

    def agreed_colour(
        self, colours: Float[Tensor, "batch view point 3"], seen: Bool[Tensor, "batch view point"]
    ) -> Float[Tensor, "batch cell 3"]:
        """Mean colours blended over the planes, sharply by the variance over the views; a point is a plane's cell."""
        mean, variance = masked_mean_and_variance(colours, seen)
        count = seen.sum(1)
        cost = torch.where(count >= 2, variance.sum(-1), UNMATCHED_VARIANCE)
        score = torch.where(count > 0, -cost * self.log_sharpness.exp(), -1e4)  # what no view sees says nothing
        weights = torch.softmax(score.unflatten(1, (self.planes, -1)), 1)
        return (weights[..., None] * mean.unflatten(1, (self.planes, -1))).sum(1)


class LatentToken(nn.Module):
    """The latent as a token: its values at each ray's pixel, or (`global`) all of it, pooled, as one vector."""

    def __init__(self, query: Literal["global", "pixel"], width: int) -> None:
        super().__init__()
        self.query = query
        numbers = LATENT_CHANNELS if query == "pixel" else LATENT_CHANNELS * GLOBAL_CELLS**2
        self.embed = nn.Linear(numbers, width)

    def forward(
        self, latent: TargetLatent, target: Cameras, pixels: Float[Tensor, "batch ray 2"]
    ) -> Float[Tensor, "batch ray width"]:
        """Tokens of the rays through ``pixels`` of [batch] ``target`` cameras (crops of the latent's)."""
        if self.query == "pixel":
            return self.embed(latent.at(target, pixels) * 2 - 1)
        pooled = F.adaptive_avg_pool2d(latent.values, (GLOBAL_CELLS, GLOBAL_CELLS))
        return self.embed(pooled.flatten(1) * 2 - 1)[:, None].expand(-1, pixels.shape[1], -1)
