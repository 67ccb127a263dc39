"""Tokens of the small prior: each stands for a patch of one source photo, what is seen there and along which ray.

source latent (4) + thumbnail (3) + ray map (6) --conv, stride 4--> patches --> tokens
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class SourceTokens(nn.Module):
    """A token per 4x4 latents (32x32 pixels) of every source view; and the token that stands for no condition."""

    def __init__(self, width: int):
        super().__init__()
        self.first = nn.Conv2d(4 + 3 + 6, width // 2, 3, padding=1)
        self.second = nn.Conv2d(width // 2, width, 4, stride=4)
        self.hidden = nn.Linear(width, 2 * width)
        self.last = nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)
        self.empty = nn.Parameter(torch.randn(width) * 0.5)

    def forward(
        self,
        latents: Float[Tensor, "batch view 4 h w"],
        thumbnails: Float[Tensor, "batch view 3 h w"],
        rays: Float[Tensor, "batch view 6 h w"],
    ) -> Float[Tensor, "batch token width"]:
        """Tokens of all views in one set: nothing says which view is the first.

        Args:
            latents: of the source photos, with pictures in [0, 1] and ray maps (``relative_ray_maps``) of their size.
        """
        x = torch.cat([latents, 2 * thumbnails - 1, rays], 2).flatten(0, 1)
        below, right = -x.shape[-2] % 4, -x.shape[-1] % 4
        x = F.pad(x, (0, right, 0, below), mode="replicate")
        x = self.second(F.silu(self.first(x))).flatten(2).transpose(1, 2)
        x = self.norm(x + self.last(F.silu(self.hidden(x))))
        return x.unflatten(0, (len(latents), -1)).flatten(1, 2)

    def nothing(self, batch: int, count: int) -> Float[Tensor, "batch token width"]:
        """``count`` copies of the token for no condition: attention over equal tokens is attention to one."""
        return self.empty.expand(batch, count, -1)
