"""The last stage: a small image-space U-Net adds a residual to the blended colour and predicts the error that is left.

Blending can only average what the sources show; sharpening, halos at occlusion edges and pixels that no source sees
need neighbours. The predicted error is the scale b of a Laplace distribution of the colour error; confidence is the
probability P(|error| < 0.1) = 1 - exp(-0.1 / b).
"""

import itertools

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from idnerf.models.activation import activate, start_at_unit_gain
from idnerf.models.feature_pyramid import ResidualBlock, start_at_zero, upsample2
from idnerf.models.fine_samples import FineOutput
from idnerf.models.view_blending import Blend, ContextBlending

CONFIDENT_ERROR = 0.1
"""Confidence is the probability that the mean absolute colour error stays below this."""


class ImageRefinement(nn.Module):
    """U-Net at scales 1, 1/2, 1/4 over the composited tokens. The colour residual starts at zero."""

    def __init__(self, token_channels: int, widths: tuple[int, int, int]):
        super().__init__()
        self.context_blending: ContextBlending | None = None
        w0, w1, w2 = widths
        # tokens, colour, position, spread, opacity, seen, disagreement
        self.stem = nn.Conv2d(token_channels + 3 + 5, w0, 3, padding=1)
        self.block0 = ResidualBlock(w0)
        self.down1 = nn.Sequential(nn.Conv2d(w0, w1, 4, stride=2, padding=1), ResidualBlock(w1))
        self.down2 = nn.Sequential(nn.Conv2d(w1, w2, 4, stride=2, padding=1), ResidualBlock(w2), ResidualBlock(w2))
        self.lateral1 = nn.Conv2d(w2, w1, 1)
        self.up1 = ResidualBlock(w1)
        self.lateral0 = nn.Conv2d(w1, w0, 1)
        self.up0 = ResidualBlock(w0)
        self.head = nn.Conv2d(w0, 4, 3, padding=1)
        start_at_zero(self.head)
        self.deeper: DeeperScales | None = None

    def add_scales(self, widths: tuple[int, ...]) -> None:
        """Scales 1/8, 1/16, ... too, of so many channels."""
        self.deeper = DeeperScales(self.lateral1.in_channels, widths)

    def add_context_blending(self, blend_width: int) -> None:
        """Blend once more, with this U-Net's context, before the residual is added."""
        self.context_blending = ContextBlending(self.head.in_channels, blend_width)
        start_at_unit_gain(self.context_blending)

    def forward(
        self,
        fine: FineOutput,
        blend: Blend,
        added: Float[Tensor, "batch stem height width"] | None = None,
    ) -> tuple[Float[Tensor, "batch 3 height width"], Float[Tensor, "batch height width"]]:
        """Colour (about [0, 1]) and the Laplace scale b of its error. Tile sizes must be multiples of 4, and
        of the smallest scale.

        ``added``: from view refinement, to the first convolution's output.
        """
        seen = fine.visibility.sum(1)  # expected number of views
        maps = torch.stack([fine.position * 2 - 1, fine.spread * 10, fine.opacity, seen / 3, blend.deviation * 5], 1)
        x = torch.cat([fine.tokens, blend.rgb * 2 - 1, maps], 1).contiguous(memory_format=torch.channels_last)
        x = self.stem(x) if added is None else self.stem(x) + added
        s0 = self.block0(x)
        s1 = self.down1(activate(s0))
        s2 = self.down2(activate(s1))
        s2 = s2 if self.deeper is None else self.deeper(s2)
        s1 = self.up1(s1 + upsample2(self.lateral1(activate(s2))))
        s0 = self.up0(s0 + upsample2(self.lateral0(activate(s1))))
        context = activate(s0)
        out = self.head(context).float()
        blended = blend.rgb if self.context_blending is None else self.context_blending(blend, fine.colours, context)
        return blended + out[:, :3], F.softplus(out[:, 3] - 2.5) + 1e-3


class DeeperScales(nn.Module):
    """A U-Net below the U-Net: what lies further away, for plain surfaces and for what no source sees.

    From features to features of the same size, a multiple of 2 to the power of ``len(widths)``; starts as no change.
    """

    def __init__(self, channels: int, widths: tuple[int, ...]):
        super().__init__()
        sizes = list(itertools.pairwise((channels, *widths)))
        self.downs = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 4, stride=2, padding=1), ResidualBlock(b), ResidualBlock(b)) for a, b in sizes
        )
        self.laterals = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in sizes)
        self.ups = nn.ModuleList(ResidualBlock(a) for a, _ in sizes)
        start_at_unit_gain(self)
        for lateral in self.laterals:
            assert isinstance(lateral, nn.Conv2d)
            start_at_zero(lateral)

    def forward(self, x: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch channel height width"]:
        scales = [x]
        for down in self.downs:
            scales.append(down(activate(scales[-1])))
        x = scales.pop()
        for lateral, up in zip(reversed(self.laterals), reversed(self.ups), strict=True):
            x = up(scales.pop() + upsample2(lateral(activate(x))))
        return x


def confidence_of(scale: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """P(|error| < CONFIDENT_ERROR) under a Laplace distribution of this scale."""
    return -torch.expm1(-CONFIDENT_ERROR / scale)
