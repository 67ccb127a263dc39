"""Outlines of thin sheets (leaves, fronds, petals, grids) and reliefs of height fields, as small maps.

An outline is a field that is positive inside and crosses zero at the edge, so that its bilinear interpolation
cuts a sharp edge at any magnification. Maps are indexed [v, u]; v runs from the stem (0) to the tip (1).
"""

import math
import random

import torch
from jaxtyping import Float
from torch import Tensor

from idnerf.data.procedural.textures import fourier_noise, grid_coordinates

Map = Float[Tensor, "size size"]

OUTLINES = ("leaf", "leaf", "frond", "palm", "petal", "grid", "bars", "disc", "ragged", "branch", "square")


def leaf_outline(u: Map, v: Map, rng: random.Random, generator: torch.Generator) -> Map:
    belly, width = rng.uniform(0.3, 0.9), rng.uniform(0.5, 0.95)
    curve = rng.uniform(-0.25, 0.25) * torch.sin(math.pi * v)
    edge = width * torch.sin(math.pi * v.clamp(0, 1) ** belly).clamp_min(0) ** rng.uniform(0.8, 1.4)
    teeth, depth = rng.choice([0, 0, 8, 14, 24]), rng.uniform(0.03, 0.2)
    if teeth:
        edge = edge * (1 - depth * (v * teeth % 1))
    return edge - (2 * u - 1 - curve).abs() - 0.015


def frond_outline(u: Map, v: Map, rng: random.Random, generator: torch.Generator) -> Map:
    """A rib with leaflets on both sides."""
    count, slant = rng.randint(7, 16), rng.uniform(0.3, 1.2)
    across = (2 * u - 1).abs()
    envelope = rng.uniform(0.7, 0.95) * torch.sin(math.pi * (0.08 + 0.9 * v) ** rng.uniform(0.6, 1.1)).clamp_min(0)
    phase = (v * count - slant * across * count * 0.25) % 1
    leaflet = rng.uniform(0.25, 0.42) * (1 - (across / envelope.clamp_min(1e-3)) ** 2) - (phase - 0.5).abs()
    leaflet = torch.where(across < envelope, leaflet, -0.2)
    return torch.maximum(leaflet * 0.3, 0.035 * (1.1 - v) - across * 0.6)


def palm_outline(u: Map, v: Map, rng: random.Random, generator: torch.Generator) -> Map:
    """Lobes around a centre: maple, ivy, stars."""
    x, y = 2 * u - 1, 2 * v - 1
    angle, radius = torch.atan2(x, y), torch.hypot(x, y)
    lobes = rng.randint(3, 7)
    wave = (0.5 + 0.5 * torch.cos(lobes * angle)) ** rng.uniform(0.5, 2)
    return 0.3 + 0.62 * wave * rng.uniform(0.5, 1) - radius


def petal_outline(u: Map, v: Map, rng: random.Random, generator: torch.Generator) -> Map:
    width, power = rng.uniform(0.45, 0.9), rng.uniform(0.5, 1.2)
    edge = width * (torch.sin(math.pi * v**0.5 * 0.5) ** power) * (1 - v**6).clamp_min(0).sqrt()
    return edge + 0.06 - (2 * u - 1).abs() - 0.08 * step_outside(v)


def step_outside(v: Map) -> Map:
    """1 at the last texels along v, where outlines must be closed."""
    return (v > 0.985).float() * 20


def grid_outline(u: Map, v: Map, rng: random.Random, generator: torch.Generator) -> Map:
    columns, rows = rng.randint(2, 9), rng.randint(2, 9)
    thick = rng.uniform(0.05, 0.16)
    x, y = (u * columns + 0.5) % 1 - 0.5, (v * rows + 0.5) % 1 - 0.5
    if rng.random() < 0.3:
        x, y = (u * columns + v * columns) % 1 - 0.5, (u * rows - v * rows) % 1 - 0.5
    return thick - torch.minimum(x.abs(), y.abs())


def bars_outline(u: Map, v: Map, rng: random.Random, generator: torch.Generator) -> Map:
    count, thick = rng.randint(3, 12), rng.uniform(0.08, 0.3)
    bar = thick - ((u * count) % 1 - 0.5).abs()
    rail = 0.05 - torch.minimum((v - 0.06).abs(), (v - 0.94).abs())
    return torch.maximum(bar, rail * 2)


def disc_outline(u: Map, v: Map, rng: random.Random, generator: torch.Generator) -> Map:
    radius = torch.hypot(2 * u - 1, 2 * v - 1)
    hole = rng.choice([-1.0, rng.uniform(0.3, 0.8)])
    return torch.minimum(0.97 - radius, radius - hole)


def ragged_outline(u: Map, v: Map, rng: random.Random, generator: torch.Generator) -> Map:
    """A noisy blob with holes: torn paper, moss, far foliage."""
    noise = fourier_noise(1, len(u), rng.uniform(1.0, 1.8), generator)[0]
    return 0.75 + 0.22 * noise - torch.hypot(2 * u - 1, 2 * v - 1)


def branch_outline(u: Map, v: Map, rng: random.Random, generator: torch.Generator) -> Map:
    """A stem with twigs and small leaves, drawn as thick segments."""
    field = 0.02 - (u - 0.5).abs() * (1 + 1.5 * v)
    for k in range(rng.randint(6, 12)):
        side = 1 if k % 2 else -1
        base, length = rng.uniform(0.02, 0.8), rng.uniform(0.2, 0.45)
        tip_u, tip_v = (
            0.5 + side * length * rng.uniform(0.6, 0.95),
            min(base + length * rng.uniform(0.3, 0.9), 0.95),
        )
        du, dv = tip_u - 0.5, tip_v - base
        along = (((u - 0.5) * du + (v - base) * dv) / (du * du + dv * dv)).clamp(0, 1)
        away = torch.hypot(u - 0.5 - along * du, v - base - along * dv)
        blade = rng.uniform(0.02, 0.07) * torch.sin(math.pi * along).clamp_min(0) + 0.008
        field = torch.maximum(field, blade - away)
    return field


def outline_bank(size: int, rng: random.Random, generator: torch.Generator) -> Float[Tensor, "map size size"]:
    """One map per entry of ``OUTLINES``, shapes drawn anew."""
    functions = {
        "leaf": leaf_outline,
        "frond": frond_outline,
        "palm": palm_outline,
        "petal": petal_outline,
        "grid": grid_outline,
        "bars": bars_outline,
        "disc": disc_outline,
        "ragged": ragged_outline,
        "branch": branch_outline,
        "square": lambda u, v, rng, generator: torch.ones_like(u),
    }
    u, v = grid_coordinates(size)
    return torch.stack([functions[name](u, v, rng, generator) for name in OUTLINES])


def relief_bank(
    count: int, size: int, rng: random.Random, generator: torch.Generator
) -> Float[Tensor, "map size size"]:
    """Height fields with values in [0, 1]: hills, ridges, bumps, terraces."""
    u, v = grid_coordinates(size)
    maps = []
    for _ in range(count):
        noise = fourier_noise(1, size, rng.uniform(1.7, 2.6), generator)[0]
        kind = rng.choice(["hills", "ridges", "bumps", "terraces"])
        if kind == "ridges":
            noise = 1 - noise.abs()
        elif kind == "bumps":
            n = rng.randint(2, 6)
            noise = 0.3 * noise + 2 * (torch.sin(math.pi * n * u) * torch.sin(math.pi * n * v)).abs()
        elif kind == "terraces":
            x = noise * 1.5
            noise = x.floor() + ((x - x.floor() - 0.5) * 4 + 0.5).clamp(0, 1)
        low, high = noise.min(), noise.max()
        maps.append(((noise - low) / (high - low)) * 0.96 + 0.02)
    return torch.stack(maps)
