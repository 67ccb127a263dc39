"""A bank of random textures, one per surface material: each is an image that repeats at its borders.

Textures are drawn once per scene and looked up at the hit points through a mip pyramid (``atlas``), which
costs far less than evaluating noise at every hit and band-limits them by construction. Spectra fall off like
1/f^beta, as those of photos do (Field 1987); "dead leaves" are the classical model of occlusion statistics
(Lee, Mumford, Huang 2001).
"""

import math
import random
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

Image = Float[Tensor, "size size"]
Colours = Float[Tensor, "size size 3"]


def fourier_noise(
    count: int, size: int, beta: float, generator: torch.Generator, low_cut: float = 0.0
) -> Float[Tensor, "count size size"]:
    """Periodic noise whose amplitude falls as 1/f^beta; mean 0, standard deviation 1.

    ``low_cut``: frequencies below this many cycles per tile are removed.
    """
    fy = torch.fft.fftfreq(size)[:, None] * size
    fx = torch.fft.rfftfreq(size)[None] * size
    frequency = torch.sqrt(fx * fx + fy * fy)
    amplitude = frequency.clamp_min(1.0) ** -beta * (frequency >= max(low_cut, 0.5))
    white = torch.randn(count, size, size // 2 + 1, 2, generator=generator)
    noise = torch.fft.irfft2(torch.view_as_complex(white) * amplitude, s=(size, size))
    return noise / noise.std(dim=(1, 2), keepdim=True).clamp_min(1e-6)


def hsv_to_rgb(h: float, s: float, v: float) -> list[float]:
    """Standard hue/saturation/value (all in [0, 1]) to RGB in [0, 1]."""
    return [v - v * s * max(0.0, min(k, 4 - k, 1)) for k in ((n + h * 6) % 6 for n in (5, 3, 1))]


def random_colour(rng: random.Random, hue: float | None = None, vivid: float = 0.0) -> list[float]:
    """A colour with the statistics of photos: mostly muted, any brightness."""
    if hue is None:
        # Earth, skin, wood and lamps are warm; then foliage, sky; other hues are rare.
        warm, green, blue = rng.gauss(0.085, 0.035), rng.gauss(0.27, 0.06), rng.gauss(0.58, 0.04)
        h = rng.choices([warm, green, blue, rng.random()], [0.5, 0.17, 0.16, 0.17])[0]
    else:
        h = hue + rng.gauss(0, 0.025)
    s = rng.betavariate(1.2, 3.4 - 2.0 * vivid)
    v = rng.betavariate(1.6, 1.3)
    return hsv_to_rgb(h % 1, s, 0.08 + 0.87 * v)


def random_palette(rng: random.Random, count: int = 4, vivid: float = 0.0) -> Float[Tensor, "count 3"]:
    """Colours that go together: variations of one (70 %), or unrelated ones."""
    if rng.random() < 0.3:
        return torch.tensor([random_colour(rng, vivid=vivid) for _ in range(count)])
    base = torch.tensor(random_colour(rng, vivid=vivid))
    spread = rng.choice([0.08, 0.2, 0.45])
    gains = torch.tensor([math.exp(rng.gauss(0, 2 * spread)) for _ in range(count)])[:, None]
    # Colours of one scene differ from warm to cold more than from green to magenta.
    warmth = torch.tensor([[rng.gauss(0, 0.25 * spread)] for _ in range(count)]) * torch.tensor([1.0, 0.1, -1.0])
    shifts = warmth + torch.tensor([[rng.gauss(0, 0.08 * spread) for _ in range(3)] for _ in range(count)])
    return (base * gains + shifts).clamp(0.02, 0.98)


def ramp(x: Image, palette: Float[Tensor, "count 3"]) -> Colours:
    """Piecewise linear colours along a palette, ``x`` in [0, 1]."""
    position = x.clamp(0, 1) * (len(palette) - 1)
    lower = position.floor().clamp_max(len(palette) - 2).long()
    fraction = (position - lower)[..., None]
    return palette[lower] * (1 - fraction) + palette[lower + 1] * fraction


def equalised(noise: Image) -> Image:
    """Gaussian noise to [0, 1], roughly uniform."""
    return torch.sigmoid(1.7 * noise)


def grid_coordinates(size: int) -> tuple[Image, Image]:
    """(u, v) at the texel centres, in [0, 1]."""
    axis = (torch.arange(size) + 0.5) / size
    v, u = torch.meshgrid(axis, axis, indexing="ij")
    return u, v


def warped_coordinates(size: int, strength: float, generator: torch.Generator) -> tuple[Image, Image]:
    """Texel coordinates pushed about by smooth noise; still periodic."""
    u, v = grid_coordinates(size)
    shift = fourier_noise(2, size, 2.0, generator) * strength
    return u + shift[0], v + shift[1]


def cells(
    u: Image, v: Image, count: int, jitter: float, generator: torch.Generator
) -> tuple[Image, Image, Int[Tensor, "size size"]]:
    """Voronoi cells of a jittered, periodic grid: nearest and second distance (in cells), cell index."""
    offsets = 0.5 + jitter * (torch.rand(count, count, 2, generator=generator) - 0.5)
    x, y = u * count, v * count
    column, row = x.floor(), y.floor()
    first, second = torch.full_like(u, torch.inf), torch.full_like(u, torch.inf)
    which = torch.zeros_like(u, dtype=torch.long)
    points = offsets.reshape(-1, 2)
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            index = ((row + dy) % count).long() * count + ((column + dx) % count).long()
            point = points[index]
            x_off, y_off = column + dx + point[..., 0] - x, row + dy + point[..., 1] - y
            distance = x_off * x_off + y_off * y_off
            nearer = distance < first
            second = torch.minimum(second, torch.where(nearer, first, distance))
            which = torch.where(nearer, index, which)
            first = torch.minimum(first, distance)
    return first.sqrt(), second.sqrt(), which


def step(x: Float[Tensor, "rows columns"], width: float) -> Float[Tensor, "rows columns"]:
    """0 below, 1 above zero, with a soft edge of ``width``."""
    return (x / width + 0.5).clamp(0, 1)


Family = Callable[[int, random.Random, torch.Generator], tuple[Colours, Image]]


def noise_texture(size: int, rng: random.Random, generator: torch.Generator) -> tuple[Colours, Image]:
    noise = fourier_noise(2, size, rng.uniform(1.15, 2.0), generator)
    colours = ramp(equalised(noise[0]), random_palette(rng, rng.choice([3, 4, 6])))
    return colours * (1 + 0.08 * noise[1, ..., None]), noise[0]


def warped_texture(size: int, rng: random.Random, generator: torch.Generator) -> tuple[Colours, Image]:
    """Marble: bands through warped coordinates."""
    u, v = warped_coordinates(size, rng.uniform(0.03, 0.12), generator)
    bands = 0.5 + 0.5 * torch.sin(2 * math.pi * (rng.randint(0, 4) * u + rng.randint(1, 5) * v))
    fine = fourier_noise(1, size, 1.2, generator)[0]
    return ramp(bands + 0.12 * fine, random_palette(rng, 5)), bands + 0.2 * fine


def checker_texture(size: int, rng: random.Random, generator: torch.Generator) -> tuple[Colours, Image]:
    u, v = grid_coordinates(size)
    count = 2 * rng.randint(1, 4)
    odd = (((u * count).floor() + (v * count).floor()) % 2)[..., None]
    palette = random_palette(rng, 2)
    grain = fourier_noise(1, size, 1.2, generator)[0]
    return (palette[0] * odd + palette[1] * (1 - odd)) * (1 + 0.12 * grain[..., None]), 0.3 * grain


def brick_texture(size: int, rng: random.Random, generator: torch.Generator) -> tuple[Colours, Image]:
    u, v = grid_coordinates(size)
    rows = 2 * rng.randint(2, 6)
    columns = rng.choice([rows // 2, rows, max(rows // 4, 1)])
    shift = rng.choice([0.0, 0.5, 0.5])
    row = (v * rows).floor()
    x, y = (u * columns + shift * (row % 2)) % columns, v * rows
    mortar = rng.uniform(0.03, 0.12)
    fx, fy = x % 1, y % 1
    aspect = columns / rows
    edge = torch.minimum(torch.minimum(fx, 1 - fx) / aspect, torch.minimum(fy, 1 - fy)) - mortar
    inside = step(edge, 0.06)
    palette = random_palette(rng, 6)
    shade = torch.rand(rows * columns, generator=generator)[(row * columns + x.floor()).long() % (rows * columns)]
    grain = fourier_noise(1, size, 1.2, generator)[0]
    brick = ramp(shade, palette[:5]) * (1 + 0.15 * grain[..., None])
    return brick * inside[..., None] + palette[5] * (1 - inside[..., None]), 2 * inside + 0.2 * grain


def stripe_texture(size: int, rng: random.Random, generator: torch.Generator) -> tuple[Colours, Image]:
    u, _ = warped_coordinates(size, rng.choice([0.0, 0.004, 0.02]), generator)
    count = rng.randint(2, 12)
    thresholds = step(torch.sin(2 * math.pi * count * u) + rng.uniform(-0.7, 0.7), 0.2)
    palette = random_palette(rng, 2, vivid=0.3)
    grain = fourier_noise(1, size, 1.2, generator)[0]
    return ramp(thresholds, palette) * (1 + 0.1 * grain[..., None]), thresholds + 0.2 * grain


def wood_texture(size: int, rng: random.Random, generator: torch.Generator) -> tuple[Colours, Image]:
    """Long grain: noise stretched along v, plank gaps."""
    noise = fourier_noise(2, size, 1.2, generator)
    stretch = rng.choice([8, 16])
    long = noise[:, :: size // (size // stretch), :]
    long = torch.nn.functional.interpolate(long[None], size=(size, size), mode="bilinear")[0]
    u, v = warped_coordinates(size, 0.01, generator)
    rings = torch.sin(2 * math.pi * rng.randint(2, 8) * (u + 0.08 * long[0] + 0.03 * torch.sin(2 * math.pi * v)))
    hue = rng.choice([0.06, 0.08, 0.09, rng.random()])
    palette = torch.tensor([random_colour(rng, hue, 0.3) for _ in range(3)])
    palette = 0.5 * palette + 0.5 * palette[:1]
    planks = rng.choice([0, 2, 4, 6])
    gap = step((u * planks % 1) - 0.03, 0.03) if planks else torch.ones_like(u)
    height = 0.3 * rings + 0.5 * long[1]
    return ramp(0.5 + 0.25 * rings + 0.2 * long[1], palette) * gap[..., None], height + 2 * gap


def cell_texture(size: int, rng: random.Random, generator: torch.Generator) -> tuple[Colours, Image]:
    """Cobbles, cracked earth, mosaics."""
    u, v = warped_coordinates(size, rng.choice([0.0, 0.01, 0.03]), generator)
    count = rng.randint(3, 14)
    first, second, index = cells(u, v, count, rng.uniform(0.5, 1.0), generator)
    border = step(second - first - rng.uniform(0.03, 0.2), 0.1)
    shade = torch.rand(count * count, generator=generator)[index]
    palette = random_palette(rng, 5)
    grain = fourier_noise(1, size, 1.2, generator)[0]
    colours = ramp(shade, palette[:4]) * (1 + 0.15 * grain[..., None])
    height = (1 - first) if rng.random() < 0.5 else border
    return colours * border[..., None] + palette[4] * (1 - border[..., None]), 1.5 * height + 0.15 * grain


def speckle_texture(size: int, rng: random.Random, generator: torch.Generator) -> tuple[Colours, Image]:
    """Dots, terrazzo, gravel: discs of random size and colour on a noisy ground."""
    u, v = warped_coordinates(size, rng.choice([0.0, 0.01, 0.02]), generator)
    count = rng.randint(4, 24)
    first, _, index = cells(u, v, count, rng.uniform(0.2, 1.0), generator)
    radius = 0.08 + rng.uniform(0.1, 0.4) * torch.rand(count * count, generator=generator)[index]
    disc = step(radius - first, 0.12)
    palette = random_palette(rng, 4, vivid=0.4)
    ground = fourier_noise(1, size, 1.3, generator)[0]
    shade = torch.rand(count * count, generator=generator)[index]
    colours = ramp(shade, palette[:3]) * disc[..., None] + palette[3] * (1 - disc[..., None])
    return colours * (1 + 0.12 * ground[..., None]), disc + 0.2 * ground


def glyph_texture(size: int, rng: random.Random, generator: torch.Generator) -> tuple[Colours, Image]:
    """Rows of made-up letters: random 5x7 bitmaps, words and margins."""
    rows = rng.choice([4, 6, 8, 12, 18, 22])
    columns = int(rows * rng.uniform(1.2, 2.0))
    bitmaps = (torch.rand(rows * columns, 7, 5, generator=generator) < 0.55).float()
    spaces = torch.rand(rows * columns, generator=generator) < 0.18
    bitmaps[spaces] = 0
    u, v = grid_coordinates(size)
    x, y = u * columns, v * rows
    glyph = (y.floor() * columns + x.floor()).long().clamp_max(rows * columns - 1)
    gx, gy = (x % 1 * 6.5 - 0.75).floor().long(), (y % 1 * 10 - 1.5).floor().long()
    inside = (gx >= 0) & (gx < 5) & (gy >= 0) & (gy < 7)
    ink = bitmaps[glyph, gy.clamp(0, 6), gx.clamp(0, 4)] * inside
    paper, colour = random_palette(rng, 3)[:2], random_palette(rng, 2, vivid=0.5)
    if rng.random() < 0.5:  # black on white, or near it
        paper, colour = 0.85 + 0.12 * paper, 0.25 * colour
    stain = fourier_noise(1, size, 1.6, generator)[0]
    ground = ramp(equalised(stain), 0.8 * paper[:1] + 0.2 * paper)
    return ground * (1 - ink[..., None]) + colour[0] * ink[..., None], 0.3 * ink


def leaf_texture(size: int, rng: random.Random, generator: torch.Generator) -> tuple[Colours, Image]:
    """Along v from stem to tip, veins branching off the middle rib at u = 0.5."""
    u, v = grid_coordinates(size)
    across = (u - 0.5).abs()
    count = rng.randint(5, 14)
    phase = (v * count + rng.uniform(1, 3) * across * count * 0.5) % 1
    veins = step(0.08 - torch.minimum(phase, 1 - phase), 0.12) * 0.7
    rib = step(0.018 - across, 0.02)
    lines = torch.maximum(veins, rib)
    green, autumn = rng.gauss(0.29, 0.06), rng.uniform(0.03, 0.18)
    hue = rng.choices([green, autumn, rng.random()], [0.75, 0.15, 0.1])[0]
    base = torch.tensor(hsv_to_rgb(hue % 1, rng.uniform(0.35, 0.8), rng.uniform(0.2, 0.65)))
    vein = base * rng.uniform(0.6, 1.7) + rng.uniform(0, 0.12)
    noise = fourier_noise(2, size, 1.5, generator)
    tint = 1 + 0.18 * noise[0, ..., None] + 0.3 * (v[..., None] - 0.5) * rng.uniform(-1, 1)
    spots = step(noise[1] - rng.uniform(1.5, 4.0), 0.3)[..., None]
    colours = base * tint * (1 - 0.6 * lines[..., None]) + vein * 0.6 * lines[..., None]
    return colours * (1 - 0.6 * spots), -lines + 0.25 * noise[0] + 1.5 * (phase - 0.5).abs()


def petal_texture(size: int, rng: random.Random, generator: torch.Generator) -> tuple[Colours, Image]:
    """From one colour at the base to another at the tip, with fine streaks and spots."""
    u, v = grid_coordinates(size)
    hue = rng.choice([rng.uniform(-0.08, 0.17), rng.uniform(0.7, 1.0), rng.random()])
    tip = torch.tensor(hsv_to_rgb(hue % 1, rng.uniform(0.05, 0.8), rng.uniform(0.55, 1.0)))
    root = torch.tensor(hsv_to_rgb((hue + rng.gauss(0, 0.06)) % 1, rng.uniform(0.2, 0.8), rng.uniform(0.4, 0.95)))
    noise = fourier_noise(2, size, 1.3, generator)
    streak = noise[0, :1].expand(size, size)
    mix = (1.3 * v + 0.12 * noise[1] - 0.1).clamp(0, 1)[..., None]
    colours = root * (1 - mix) + tip * mix
    spots = step(noise[1] - rng.uniform(1.2, 3.5), 0.4)[..., None] * (1 - mix)
    return colours * (1 + 0.1 * streak[..., None]) * (1 - 0.6 * spots), 0.5 * streak + (u - 0.5).abs()


def plain_texture(size: int, rng: random.Random, generator: torch.Generator) -> tuple[Colours, Image]:
    """Painted walls, plastic: almost no contrast, sometimes with large stains."""
    noise = fourier_noise(2, size, rng.uniform(1.0, 1.9), generator)
    colour = torch.tensor(random_colour(rng, vivid=0.4))
    stain = rng.choice([0.0, 0.0, rng.uniform(0.02, 0.12)]) * equalised(fourier_noise(1, size, 2.2, generator)[0])
    return colour * (1 - stain + rng.uniform(0.003, 0.04) * noise[0])[..., None], 0.1 * noise[1]


def white_texture(size: int, rng: random.Random, generator: torch.Generator) -> tuple[Colours, Image]:
    """White with hardly any grain: takes the colour of the material's tint (paint, paper, enamel, plastic)."""
    noise = fourier_noise(1, size, rng.uniform(0.8, 1.6), generator)[0]
    return torch.full((size, size, 3), 0.92) * (1 + rng.uniform(0.0, 0.012) * noise[..., None]), 0.1 * noise


def fur_texture(size: int, rng: random.Random, generator: torch.Generator) -> tuple[Colours, Image]:
    """Strands: noise smeared along a smooth field of directions (line integral convolution, Cabral 1993)."""
    noise = fourier_noise(1, size, rng.uniform(0.0, 0.5), generator)[0]
    smooth = fourier_noise(2, size, 2.4, generator)
    angle = rng.uniform(0, 2 * math.pi) + rng.uniform(0.1, 1.2) * smooth[0]
    dx, dy = torch.cos(angle), torch.sin(angle)
    v, u = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    flat, strands = noise.reshape(-1), torch.zeros_like(noise)
    for _ in range(rng.choice([8, 14, 20])):
        strands = strands + flat[(v.long() % size) * size + u.long() % size]
        u, v = u + dx, v + dy
    strands = strands / strands.std().clamp_min(1e-6)
    palette = random_palette(rng, 4)
    shade = equalised(0.8 * smooth[1] + rng.uniform(0.2, 0.8) * strands)
    return ramp(shade, palette) * (1 + rng.uniform(0.1, 0.3) * strands[..., None]), strands


def collage_texture(size: int, rng: random.Random, generator: torch.Generator) -> tuple[Colours, Image]:
    """Dead leaves: discs and boxes of power-law sizes hide one another, each with its own shading."""
    u, v = grid_coordinates(size)
    grain = fourier_noise(3, size, 1.2, generator)
    palette = random_palette(rng, 8, vivid=0.2)
    palette = palette.mean(0) + rng.uniform(0.3, 1.0) * (palette - palette.mean(0))
    colours = ramp(equalised(grain[0]), palette[:3])
    height = grain[0] * 0.3
    for _ in range(rng.randint(25, 70)):
        radius = min(0.35, 0.025 * rng.random() ** -0.7)
        x, y = rng.random(), rng.random()
        low_x, high_x = max(int((x - radius) * size), 0), min(int((x + radius) * size) + 1, size)
        low_y, high_y = max(int((y - radius) * size), 0), min(int((y + radius) * size) + 1, size)
        window = (slice(low_y, high_y), slice(low_x, high_x))
        du, dv = (u[window] - x) / radius, (v[window] - y) / radius
        angle, flat = rng.uniform(0, math.pi), rng.uniform(1, 3)
        a = du * math.cos(angle) + dv * math.sin(angle)
        b = (dv * math.cos(angle) - du * math.sin(angle)) * flat
        shape = torch.maximum(a.abs(), b.abs()) * 1.42 if rng.random() < 0.35 else torch.hypot(a, b)
        alpha = step(1 - shape, 2.5 / (radius * size))[..., None]
        colour = palette[rng.randrange(8)] * math.exp(rng.gauss(0, 0.3))
        shading = 1 + rng.uniform(-0.3, 0.3) * a + rng.uniform(0.02, 0.2) * grain[rng.randrange(3)][window]
        colours[window] = colours[window] * (1 - alpha) + colour * shading[..., None] * alpha
        height[window] = height[window] * (1 - alpha[..., 0]) + (rng.random() + 0.3 * shading) * alpha[..., 0]
    return colours, height


def weave_texture(size: int, rng: random.Random, generator: torch.Generator) -> tuple[Colours, Image]:
    """Cloth: two threads over and under, dyed in larger stripes."""
    u, v = grid_coordinates(size)
    count = 2 * rng.randint(6, 20)
    over = ((u * count).floor() + (v * count).floor()) % 2
    warp, weft = torch.sin(math.pi * u * count).abs(), torch.sin(math.pi * v * count).abs()
    thread = over * warp + (1 - over) * weft
    dye_u = step(torch.sin(2 * math.pi * rng.randint(1, 5) * u) + rng.uniform(-0.5, 0.5), 0.1)
    dye_v = step(torch.sin(2 * math.pi * rng.randint(1, 5) * v) + rng.uniform(-0.5, 0.5), 0.1)
    dye = over * dye_u + (1 - over) * dye_v
    grain = fourier_noise(1, size, 1.2, generator)[0]
    colours = ramp(dye, random_palette(rng, 2, vivid=0.3)) * (0.65 + 0.35 * thread + 0.08 * grain)[..., None]
    return colours, thread + 0.1 * grain


def rust_texture(size: int, rng: random.Random, generator: torch.Generator) -> tuple[Colours, Image]:
    """One surface wearing through another along a noise threshold: rust, moss, peeling paint, bone."""
    noise = fourier_noise(3, size, rng.uniform(1.3, 1.9), generator)
    mask = step(noise[0] - rng.uniform(-1, 1), rng.choice([0.05, 0.3, 1.0]))
    under = ramp(equalised(noise[1]), random_palette(rng, 3))
    over = ramp(equalised(noise[2]), random_palette(rng, 3))
    fine = fourier_noise(1, size, 1.2, generator)[0]
    colours = (under * (1 - mask[..., None]) + over * mask[..., None]) * (1 + 0.1 * fine[..., None])
    return colours, mask + 0.4 * noise[1] + 0.2 * fine


FAMILIES: dict[str, Family] = {
    "noise": noise_texture,
    "warped": warped_texture,
    "checker": checker_texture,
    "brick": brick_texture,
    "stripe": stripe_texture,
    "wood": wood_texture,
    "cell": cell_texture,
    "speckle": speckle_texture,
    "glyph": glyph_texture,
    "leaf": leaf_texture,
    "petal": petal_texture,
    "plain": plain_texture,
    "collage": collage_texture,
    "weave": weave_texture,
    "rust": rust_texture,
    "white": white_texture,
    "fur": fur_texture,
}


def texture_bank(
    families: list[str], size: int, rng: random.Random, generator: torch.Generator
) -> Float[Tensor, "texture size size 5"]:
    """Draw one texture per family name: linear albedo (3), slope of the surface along u and v (2)."""
    textures = []
    for family in families:
        colours, height = FAMILIES[family](size, rng, generator)
        albedo = colours.clamp(0.015, 0.97) ** 2.2
        # Slopes are normalised: materials then choose how rough they are by one number.
        slope_u = 0.5 * (height.roll(-1, 1) - height.roll(1, 1))
        slope_v = 0.5 * (height.roll(-1, 0) - height.roll(1, 0))
        scale = torch.sqrt((slope_u**2 + slope_v**2).mean()).clamp_min(1e-4)
        slopes = torch.stack([slope_u, slope_v], -1) / scale
        textures.append(torch.cat([albedo, slopes.clamp(-3, 3)], -1))
    return torch.stack(textures)
