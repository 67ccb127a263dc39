"""Texture lookup at hit points: mip pyramid (Williams 1983), bilinear taps, all textures in one table."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Atlas:
    """Mip pyramids of several square, periodic textures in one table of texels.

    Attributes:
        texels: all levels of all textures, one row per texel.
        offsets: first row of each level.
        size: width of level 0, a power of two; level l has width size >> l.
        count: number of textures.
    """

    texels: Float[Tensor, "texel channel"]
    offsets: Int[Tensor, "level"]
    size: int
    count: int

    def to(self, device: torch.device | str) -> "Atlas":
        return Atlas(self.texels.to(device), self.offsets.to(device), self.size, self.count)


def build_atlas(textures: Float[Tensor, "texture size size channel"]) -> Atlas:
    """Average 2x2 texels repeatedly, down to 2x2."""
    count, size = textures.shape[:2]
    level, levels, offsets, total = textures, [], [], 0
    while level.shape[1] >= 2:
        levels.append(level.reshape(-1, level.shape[-1]))
        offsets.append(total)
        total += len(levels[-1])
        level = 0.25 * (
            level[:, ::2, ::2] + level[:, 1::2, ::2] + level[:, ::2, 1::2] + level[:, 1::2, 1::2]
        )  # fmt: skip
    return Atlas(torch.cat(levels), torch.tensor(offsets, dtype=torch.int32), size, count)


def sample_atlas(
    atlas: Atlas,
    texture: Int[Tensor, "point"],
    u: Float[Tensor, "point"],
    v: Float[Tensor, "point"],
    level: Float[Tensor, "point"],
) -> Float[Tensor, "point channel"]:
    """Trilinear lookup; (u, v) in tiles (the texture repeats), ``level`` 0 is the finest."""
    level = level.clamp(0, len(atlas.offsets) - 1.001)
    floor = level.floor()
    blend = level - floor
    base = floor.to(torch.int32)
    texture = texture.to(torch.int32)
    taps, weights = [], []
    for step, share in ((0, 1 - blend), (1, blend)):
        width = (atlas.size >> (base + step)).to(torch.int32)
        x, y = u * width - 0.5, v * width - 0.5
        x0, y0 = x.floor(), y.floor()
        fx, fy = x - x0, y - y0
        mask = width - 1
        left, top = x0.to(torch.int32) & mask, y0.to(torch.int32) & mask
        right, below = (left + 1) & mask, (top + 1) & mask
        start = atlas.offsets[base + step] + texture * width * width
        top, below = start + top * width, start + below * width
        taps += [top + left, top + right, below + left, below + right]
        high, low = share * fy, share * (1 - fy)
        weights += [low * (1 - fx), low * fx, high * (1 - fx), high * fx]
    return F.embedding_bag(torch.stack(taps, -1), atlas.texels, per_sample_weights=torch.stack(weights, -1), mode="sum")


def sample_maps(
    maps: Float[Tensor, "map size size"],
    index: Int[Tensor, "point"],
    u: Float[Tensor, "point"],
    v: Float[Tensor, "point"],
) -> Float[Tensor, "point"]:
    """Bilinear lookup into one of several maps, (u, v) in [0, 1], border values outside."""
    size = maps.shape[-1]
    x = (u * size - 0.5).clamp(0, size - 1.001)
    y = (v * size - 0.5).clamp(0, size - 1.001)
    x0, y0 = x.floor(), y.floor()
    fx, fy = x - x0, y - y0
    start = (index * size + y0.long()) * size + x0.long()
    flat = maps.reshape(-1)
    upper = flat[start] * (1 - fx) + flat[start + 1] * fx
    lower = flat[start + size] * (1 - fx) + flat[start + size + 1] * fx
    return upper * (1 - fy) + lower * fy
