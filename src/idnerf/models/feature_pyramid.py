"""The cascade's image encoder: a small U-Net that gives each source view features for matching.

No layer normalises over space or batch; only the output features are centred over their own image, so that what all
pixels have in common does not count as similarity. Residual branches start at zero instead. Strided convolutions have
kernels of even size, so that a cell's features are centred on the pixels it covers.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from idnerf.compiled import gradients
from idnerf.models.activation import Activation, activate, start_at_unit_gain
from idnerf.models.fused_convolution import residual
from idnerf.models.plane_conv import PlaneConv


def conv3x3(channels: int, dimensions: int) -> nn.Conv2d | PlaneConv:
    """Convolution of size 3 along two or three axes, keeping channels and size."""
    return nn.Conv2d(channels, channels, 3, padding=1) if dimensions == 2 else PlaneConv(channels, channels)


def start_at_zero(layer: nn.Conv2d | nn.Conv3d | nn.Linear) -> None:
    """Weights and bias of a branch's last layer set to zero: the branch starts out silent."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


class ResidualBlock(nn.Module):
    """x + conv(act(conv(act(x)))), the last convolution starting at zero."""

    def __init__(self, channels: int, dimensions: int = 2):
        super().__init__()
        self.conv1 = conv3x3(channels, dimensions)
        self.conv2 = conv3x3(channels, dimensions)
        start_at_zero(self.conv2)

    def forward(self, x: Tensor) -> Tensor:
        return residual(x, self.conv1, self.conv2)


def normalize_groups(
    x: Float[Tensor, "image height width channel"], groups: int
) -> Float[Tensor, "image height width channel"]:
    """Centre every channel over the map, then scale each group of channels to unit length.

    Group-wise products are then cosines, and what all pixels have in common does not count as similarity.
    """
    grouped = (x - x.mean((1, 2), keepdim=True)).unflatten(-1, (groups, -1))
    return (grouped * torch.rsqrt(grouped.square().sum(-1, keepdim=True) + 1e-6)).flatten(-2)


def matching_map(
    features: Float[Tensor, "image channel height width"],
    groups: int,
    images: Float[Tensor, "image 3 height width"] | None = None,
) -> Float[Tensor, "image height width value"]:
    """The channels-last map of these features (``normalize_groups``) and of the images' colours, in float32."""
    features = features.permute(0, 2, 3, 1)
    colours = None if images is None else images.permute(0, 2, 3, 1)
    known = [] if colours is None else [colours]
    compiled = gradients.chosen(*known, features=features)
    if compiled is not None:
        return compiled.normalize_groups(features, groups, colours)
    normalized = normalize_groups(features.float(), groups)
    return normalized if colours is None else torch.cat([normalized, colours], -1)


@dataclass(frozen=True)
class PyramidFeatures:
    """Channels-last maps of every source view.

    Attributes:
        coarse: at 1/4, matching features, groups of unit length.
        fine: at full resolution: matching features (groups of unit length), then the colour (RGB).
        middle: at 1/2, the same; None where the cascade has no middle stage.
        halved: the coarse maps of the photo halved once, twice, ..., so at 1/8, 1/16, ...
    """

    coarse: Float[Tensor, "batch view height4 width4 coarse_channel"]
    fine: Float[Tensor, "batch view height width fine_channel"]
    middle: Float[Tensor, "batch view height2 width2 middle_channel"] | None = None
    halved: tuple[Float[Tensor, "batch view _ _ coarse_channel"], ...] = ()

    def of_halved_photos(self) -> "PyramidFeatures":
        """The same for the photos halved once; ``fine`` and ``middle`` stay, and do not belong to them."""
        return replace(self, coarse=self.halved[0], halved=self.halved[1:])


class FeaturePyramid(nn.Module):
    """U-Net over scales 1, 1/2, 1/4, 1/8, 1/16 with outputs at 1/4 and 1.

    Args:
        widths: channels at 1, 1/2, 1/4, 1/8, 1/16.
        coarse_channels, coarse_groups: matching features at 1/4.
        fine_channels, fine_groups: matching features at full resolution.

    ``add_middle`` adds an output at 1/2. ``halvings`` is how often every photo is halved and encoded again. ``mixing``,
    where set, is attention among the views at 1/8: [batch view channel height8 width8] to the same.
    """

    stride = 16

    def __init__(
        self,
        widths: tuple[int, ...],
        coarse_channels: int,
        coarse_groups: int,
        fine_channels: int,
        fine_groups: int,
    ):
        super().__init__()
        self.coarse_groups, self.fine_groups = coarse_groups, fine_groups
        w0, w1, w2, w3, w4 = widths
        self.stem = nn.Conv2d(3, w0, 3, padding=1)
        self.down1 = nn.Sequential(nn.Conv2d(w0, w1, 4, stride=2, padding=1), ResidualBlock(w1))
        self.down2 = nn.Sequential(nn.Conv2d(w1, w2, 4, stride=2, padding=1), ResidualBlock(w2), ResidualBlock(w2))
        self.down3 = nn.Sequential(nn.Conv2d(w2, w3, 4, stride=2, padding=1), ResidualBlock(w3), ResidualBlock(w3))
        self.down4 = nn.Sequential(nn.Conv2d(w3, w4, 4, stride=2, padding=1), ResidualBlock(w4), ResidualBlock(w4))
        self.lateral3 = nn.Conv2d(w4, w3, 1)
        self.up3 = ResidualBlock(w3)
        self.lateral2 = nn.Conv2d(w3, w2, 1)
        self.up2 = ResidualBlock(w2)
        self.coarse_head = nn.Conv2d(w2, coarse_channels, 3, padding=1)
        self.lateral1 = nn.Conv2d(w2, w1, 1)
        self.up1 = ResidualBlock(w1)
        self.lateral0 = nn.Conv2d(w1, w0, 1)
        self.fine_head = nn.Sequential(Activation(), nn.Conv2d(w0, fine_channels, 3, padding=1))
        self.mixing: nn.Module | None = None
        self.middle_head: nn.Module | None = None
        self.middle_groups = 0
        self.halvings = 0

    def add_middle(self, channels: int, groups: int) -> None:
        """Matching features at 1/2 too."""
        self.middle_groups = groups
        width = self.lateral0.in_channels
        self.middle_head = nn.Sequential(Activation(), nn.Conv2d(width, channels, 3, padding=1))
        start_at_unit_gain(self.middle_head)

    def forward(self, images: Float[Tensor, "batch view 3 height width"]) -> PyramidFeatures:
        batch, view = images.shape[:2]
        flat = images.flatten(0, 1)
        # without gradients, one view at a time keeps full-resolution buffers to one photo's
        one_by_one = images.device.type == "cpu" and not torch.is_grad_enabled()
        parts = flat.split(1 if one_by_one else len(flat))
        if self.mixing is None:
            maps = [self._expand(self._contract(part)) for part in parts]
        else:
            contracted = [self._contract(part) for part in parts]
            deepest = torch.cat([scales[-1] for scales in contracted]).unflatten(0, (batch, view))
            mixed = self.mixing(deepest).flatten(0, 1).split(len(parts[0]))
            maps = [self._expand((*scales[:-1], deep)) for scales, deep in zip(contracted, mixed, strict=True)]
        joined = [torch.cat(parts).unflatten(0, (batch, view)) for parts in zip(*maps, strict=True)]
        halved = []
        for _ in range(self.halvings):
            flat = halve(flat)
            pieces = [self._coarse_alone(part) for part in flat.split(1 if one_by_one else len(flat))]
            halved.append(torch.cat(pieces).unflatten(0, (batch, view)))
        return PyramidFeatures(*joined, halved=tuple(halved))

    def _coarse_alone(
        self, images: Float[Tensor, "image 3 height width"]
    ) -> Float[Tensor, "image height4 width4 coarse_channel"]:
        """The coarse map and nothing else; every view by itself, without ``mixing``."""
        _, _, _, s2, s3 = self._contract(images)
        return self._coarse(self._up_to_coarse(s2, s3))

    def _up_to_coarse(self, s2: Tensor, s3: Tensor) -> Tensor:
        """Features at 1/4 that know those at 1/8."""
        return self.up2(s2 + upsample2(self.lateral2(activate(s3))))

    def _coarse(self, s2: Tensor) -> Float[Tensor, "image height4 width4 coarse_channel"]:
        """The coarse map of these."""
        return matching_map(self.coarse_head(activate(s2)), self.coarse_groups)

    def _contract(self, x: Float[Tensor, "image 3 height width"]) -> tuple[Tensor, ...]:
        """The photo padded to a multiple of the stride, then features at 1, 1/2, 1/4, and at 1/8 with 1/16 in them."""
        height, width = x.shape[-2:]
        pad = (0, -width % self.stride, 0, -height % self.stride)
        x = F.pad(x, pad, mode="replicate") if any(pad) else x
        x = x.contiguous(memory_format=torch.channels_last)
        s0 = self.stem(x * 2 - 1)
        s1 = self.down1(activate(s0))
        s2 = self.down2(activate(s1))
        s3 = self.down3(activate(s2))
        s4 = self.down4(activate(s3))
        return x, s0, s1, s2, self.up3(s3 + upsample2(self.lateral3(activate(s4))))

    def _expand(self, scales: tuple[Tensor, ...]) -> tuple[Float[Tensor, "image map_height map_width channel"], ...]:
        """From the features of every scale to the maps for matching: coarse, fine, and middle where it is wanted."""
        x, s0, s1, s2, s3 = scales
        s2 = self._up_to_coarse(s2, s3)
        s1 = self.up1(s1 + upsample2(self.lateral1(activate(s2))))
        s0 = s0 + upsample2(self.lateral0(activate(s1)))
        maps = (self._coarse(s2), matching_map(self.fine_head(s0), self.fine_groups, x))
        if self.middle_head is None:
            return maps
        return *maps, matching_map(self.middle_head(s1), self.middle_groups, F.avg_pool2d(x, 2))


def halve(images: Float[Tensor, "image 3 height width"]) -> Float[Tensor, "image 3 height2 width2"]:
    """Means of 2x2 pixels; the last row or column of an odd number stands for two."""
    odd = (0, images.shape[-1] % 2, 0, images.shape[-2] % 2)
    return F.avg_pool2d(F.pad(images, odd, mode="replicate") if any(odd) else images, 2)


def upsample2(x: Tensor) -> Tensor:
    """Bilinear upsampling by two."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
