"""The encoder: GMFlow (arXiv 2111.13680) as MatchNeRF uses it (arXiv 2304.12294, section 3.1).

A CNN brings every image to 1/8; a cross-view transformer runs on every pair of views; a small network doubles
the resolution. So every view has, for each partner, a 1/8 map and a 1/4 map.

    images [b v 3 h w] -> CNN [b v c h/8 w/8] -> pairs [2 b*p ...] -> transformer -> 1/8 maps
                                                                              '-> upsampler -> 1/4 maps
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from idnerf.compiled import dispatch
from idnerf.compiled.instance_norm import LastStep, instance_norm
from idnerf.geometry.precision import full_precision
from idnerf.models.cross_view_transformer import CrossViewTransformer

STRIDE = 8
"""Image pixels per cell of the coarse map."""

CELL_OFFSET = (STRIDE - 1) / 2
"""Strided convolutions are centred on a cell's first pixel; its middle lies so many pixels further."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

CHUNK_ELEMENTS = 8 * 1024 * 1024
"""Largest activation made at once, in numbers (32 MB): larger buffers are slow to allocate on a CPU."""


def view_pairs(views: int) -> list[tuple[int, int]]:
    """Pairs (i, j), i < j, of ``views`` views in lexicographic order: the order of every ``pair`` axis."""
    return list(combinations(range(views), 2))


@dataclass(frozen=True)
class PairMaps:
    """Feature maps of both members of every pair of views (``view_pairs``), channels last.

    Attributes:
        coarse: 1/8 of the padded image.
        fine: 1/4 of the padded image.
        padded_size: (width, height) of the images after padding at the right and the bottom; a pixel keeps
            its position, so a map is looked up as if the image had this size.
        products: of neighbouring cells at both scales (``matching.corner_products``); None where not prepared.

    Cell i of a map of stride s (8 or 4) describes the image around u = s (i + 0.5) - ``CELL_OFFSET``.
    """

    coarse: Float[Tensor, "batch pair member height width channel"]
    fine: Float[Tensor, "batch pair member fine_height fine_width channel"]
    padded_size: tuple[int, int]
    products: (
        tuple[Float[Tensor, "batch pair member row group"], Float[Tensor, "batch pair member fine_row fine_group"]]
        | None
    ) = None

    @property
    def scales(self) -> tuple[Tensor, Tensor]:
        """(coarse, fine)."""
        return self.coarse, self.fine


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with instance norm; a 1x1 convolution on the shortcut where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = None if stride == 1 and inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, maps: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h2 w2"]:
        shortcut = maps if self.shortcut is None else normalize(self.shortcut(maps), "none")
        maps = normalize(self.conv1(maps), "relu")
        return normalize(self.conv2(maps), "residual", shortcut)


def normalize(
    maps: Float[Tensor, "n c h w"], last_step: LastStep, other: Float[Tensor, "n c h w"] | None = None
) -> Float[Tensor, "n c h w"]:
    """Every channel of every map to mean 0 and variance 1, then the last step.

    ``relu``, or ``residual``, which is ReLU, the sum with ``other`` (given with it alone) and ReLU.

    Compiled for training alone: its maps are channels last, where convolutions are faster too, but round twice as much.
    """
    assert (other is not None) == (last_step == "residual")
    if torch.is_grad_enabled() and dispatch.fitting(maps) and dispatch.available():
        return instance_norm(maps, last_step, other)
    maps = F.instance_norm(maps)
    if last_step != "none":
        maps = F.relu_(maps)
    return maps if other is None else F.relu_(other + maps)


class Backbone(nn.Module):
    """The CNN: normalised image to 1/8 of its size.

    In float32 also where the rest is bfloat16: normalised after every convolution, its gradients would turn by 27
    degrees on photos.
    """

    def __init__(self, channels: int = 128, widths: tuple[int, int, int] = (64, 96, 128)) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 7, 2, 3, bias=False)
        blocks, inputs = [], widths[0]
        for width, stride in zip(widths, (1, 2, 2), strict=True):
            blocks += [ResidualBlock(inputs, width, stride), ResidualBlock(width, width)]
            inputs = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Conv2d(inputs, channels, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @full_precision
    def forward(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n c h8 w8"]:
        # Image by image when they are large: the half-size maps are the largest buffers of the model.
        per_image = self.stem.out_channels * images.shape[-1] * images.shape[-2] // 4
        parts = images.split(max(1, CHUNK_ELEMENTS // per_image))
        return torch.cat([self.head(self.blocks[2:](self._half_size(part))) for part in parts])

    def _half_size(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n c h2 w2"]:
        """The stages at half size; on the CPU computed again in the backward pass, as they would fill 0.25 GB an image
        of 640x512."""
        if torch.is_grad_enabled() and images.device.type == "cpu":
            return checkpoint(self._start, images, use_reentrant=False, preserve_rng_state=False)
        return self._start(images)

    def _start(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n c h2 w2"]:
        return self.blocks[:2](normalize(self.stem(images), "relu"))


class Upsampler(nn.Module):
    """Doubles a map's resolution: a skip path upsampled bilinearly plus a refined one."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.skip = nn.Conv2d(channels, channels, 3, 1, 1)
        self.refine = nn.Conv2d(channels, channels, 3, 1, 1)
        self.project = nn.Conv2d(channels, channels, 3, 1, 1)

    def forward(self, maps: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h2 w2"]:
        refined = F.leaky_relu(self.refine(F.interpolate(maps, scale_factor=2, mode="nearest")), 0.2)
        skip = F.interpolate(self.skip(maps), scale_factor=2, mode="bilinear", align_corners=False)
        return skip + self.project(refined)


class GMFlowEncoder(nn.Module):
    """Images of any number of views (2 up), any batch, any size, to pairwise feature maps."""

    def __init__(self, channels: int = 128, layers: int = 6, splits: int = 2) -> None:
        super().__init__()
        self.splits = splits
        self.backbone = Backbone(channels)
        self.transformer = CrossViewTransformer(channels, layers)
        self.upsampler = Upsampler(channels)

    def forward(self, images: Float[Tensor, "batch view 3 height width"]) -> PairMaps:
        """``images`` in [0, 1]. Padded inside by repeating the border; nothing is asked of the size."""
        batch, views = images.shape[:2]
        padded = self._padded(self._normalised(images.flatten(0, 1)))
        maps = self.backbone(padded)
        maps = maps.permute(0, 2, 3, 1).unflatten(0, (batch, views))
        first, second = (list(members) for members in zip(*view_pairs(views), strict=True))
        pairs = torch.stack([maps[:, first], maps[:, second]]).flatten(1, 2)
        coarse = self.transformer(pairs, self.splits).unflatten(1, (batch, -1)).permute(1, 2, 0, 3, 4, 5)
        coarse = coarse.contiguous()
        fine = torch.cat(list(self._upsampled(coarse.flatten(0, 2)))).unflatten(0, coarse.shape[:3])
        width, height = padded.shape[-1], padded.shape[-2]
        return PairMaps(coarse.float(), fine.float(), padded_size=(width, height))

    def _upsampled(self, maps: Float[Tensor, "n h w c"]) -> Iterator[Float[Tensor, "n2 h2 w2 c"]]:
        for part in maps.split(max(1, CHUNK_ELEMENTS // (4 * maps[0].numel()))):
            part = part.permute(0, 3, 1, 2)
            if torch.is_grad_enabled() and part.device.type == "cpu":  # as ``Backbone._half_size``
                yield checkpoint(self.upsampler, part, use_reentrant=False, preserve_rng_state=False).permute(
                    0, 2, 3, 1
                )
            else:
                yield self.upsampler(part).permute(0, 2, 3, 1)

    def _normalised(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
        mean, std = images.new_tensor(IMAGENET_MEAN), images.new_tensor(IMAGENET_STD)
        return (images - mean[:, None, None]) / std[:, None, None]

    def _padded(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h2 w2"]:
        # Windows must tile the 1/8 map, and instance norm needs more than one cell.
        multiple = STRIDE * max(self.splits, 2)
        right, bottom = -images.shape[-1] % multiple, -images.shape[-2] % multiple
        return F.pad(images, (0, right, 0, bottom), mode="replicate") if right or bottom else images
