"""Small ray-cast scenes, each made to show one way in which view synthesis fails; exact depth, no generator involved.

Textured rectangles and spheres in a room, a mirror, a gloss, a sky, a thing that moves from photo to photo. Cameras sit
on a sphere around a point in the middle of the room; y points down, the target's camera is at the origin.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from idnerf.geometry.rays import rays_at_pixels
from idnerf.types import Cameras, Views

PIVOT = 3.0
"""Distance of the point that all cameras look at, scene units."""
NEAR, FAR = 1.2, 8.0
"""Depth range that the cameras are given."""
LIGHT = (-0.45, -0.75, -0.48)
"""Direction towards the light."""
SUPERSAMPLE = 3
TEXTURE_SIZE = 256


@dataclass(frozen=True)
class Surface:
    """A rectangle (``up`` given) or a sphere.

    Attributes:
        center: in the world.
        right: half an edge of the rectangle as a vector; a sphere's radius is its length.
        up: half of the other edge; None for a sphere.
        texture: number of its texture.
        tiles: texture repetitions per half edge.
        kind: "matte", "glossy" or "mirror".
        motion: moved by so much from one photo to the next.
    """

    center: tuple[float, float, float]
    right: tuple[float, float, float]
    up: tuple[float, float, float] | None = None
    texture: int = 0
    tiles: float = 1.0
    kind: str = "matte"
    motion: tuple[float, float, float] = (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class World:
    """Surfaces, and what rays see that meet none: black, or a sky."""

    surfaces: tuple[Surface, ...]
    sky: bool = False


def room(back: bool = True) -> World:
    """The scene that all others change one thing of: a room with two panels, a table top and two balls."""
    surfaces = [
        Surface((0, 1.1, 3), (6, 0, 0), (0, 0, 4), texture=1, tiles=4),
        Surface((-0.75, 0.35, 2.5), (0.42, 0, 0.15), (0, -0.75, 0), texture=2, tiles=0.8),
        Surface((0.95, 0.2, 3.4), (0.5, 0, -0.25), (0, -0.9, 0), texture=3, tiles=0.8),
        Surface((0.15, 0.62, 2.5), (0.5, 0, 0), (0, 0, 0.4), texture=4, tiles=0.7),
        Surface((0.15, 0.36, 2.45), (0.25, 0, 0), texture=5, tiles=1.5),
        Surface((-0.2, -0.55, 3.6), (0.4, 0, 0), texture=6, tiles=1.5),
        Surface((0, -1, -3), (9, 0, 0), (0, -4, 0), texture=6, tiles=3),  # behind the cameras, for the mirror
    ]
    if back:
        surfaces.append(Surface((0, -1, 5.5), (7, 0, 0), (0, -4, 0), texture=0, tiles=6))
    return World(tuple(surfaces))


MAIN_BALL, FAR_PANEL = 4, 2
"""Indices in ``room().surfaces`` of what the variants change."""


def with_surface(world: World, index: int, **changes: object) -> World:
    """The world with some fields of one surface changed."""
    surfaces = list(world.surfaces)
    surfaces[index] = replace(surfaces[index], **changes)  # pyright: ignore[reportArgumentType]
    return replace(world, surfaces=tuple(surfaces))


def texture_bank(count: int = 7, seed: int = 3) -> Float[Tensor, "texture 3 size size"]:
    """Repeating textures: patches of three colours with fractal outlines, over fractal brightness."""
    generator = torch.Generator().manual_seed(seed)

    def fractal(octaves: range) -> Tensor:
        total = torch.zeros(count, TEXTURE_SIZE, TEXTURE_SIZE)
        for octave in octaves:
            cells = 2**octave
            grid = torch.randn(count, 1, cells, cells, generator=generator)
            padded = F.pad(grid, (1, 1, 1, 1), mode="circular")
            size = TEXTURE_SIZE + 2 * TEXTURE_SIZE // cells
            fine = F.interpolate(padded, (size, size), mode="bicubic", align_corners=False)
            margin = TEXTURE_SIZE // cells
            total += fine[:, 0, margin:-margin, margin:-margin] * 0.65**octave
        return total / total.flatten(1).std(1)[:, None, None]

    level = fractal(range(2, 7))
    palette = 0.12 + 0.76 * torch.rand(count, 3, 3, generator=generator)
    palette = 0.5 * palette + 0.5 * palette.mean(-1, keepdim=True)  # half as saturated
    index = (level > -0.4).long() + (level > 0.5).long()
    colours = palette[torch.arange(count)[:, None, None], index].permute(0, 3, 1, 2)
    return (colours * (1 + 0.16 * fractal(range(4, 8)))[:, None]).clamp(0.02, 0.98)


def ring(count: int, degrees: float, size: tuple[int, int]) -> Cameras:
    """The target (first) and ``count`` sources ``degrees`` away from it around the pivot, evenly spread."""
    poses = [look_from(0.0, 0.0)]
    for i in range(count):
        turn = 2 * math.pi * i / count + (0.0 if count == 2 else math.pi / 6)
        # half as high as wide: photographers walk more than they climb
        poses.append(look_from(degrees * math.cos(turn), 0.5 * degrees * math.sin(turn)))
    width, height = size
    K = torch.tensor([[0.95 * width, 0, width / 2], [0, 0.95 * width, height / 2], [0, 0, 1]])
    ones = torch.ones(count + 1)
    return Cameras(torch.stack(poses), K.expand(count + 1, 3, 3).contiguous(), size, NEAR * ones, FAR * ones)


def look_from(azimuth: float, elevation: float) -> Float[Tensor, "4 4"]:
    """c2w of a camera on the sphere around the pivot, in degrees from the origin; it looks at the pivot."""
    a, e = math.radians(azimuth), math.radians(elevation)
    backward = torch.tensor([math.sin(a) * math.cos(e), -math.sin(e), -math.cos(a) * math.cos(e)])
    forward = -backward
    right = F.normalize(torch.linalg.cross(torch.tensor([0.0, 1.0, 0.0]), forward), dim=0)
    c2w = torch.eye(4)
    c2w[:3, :3] = torch.stack([right, torch.linalg.cross(forward, right), forward], 1)
    c2w[:3, 3] = torch.tensor([0.0, 0.0, PIVOT]) + PIVOT * backward
    return c2w


def hits(
    world: World, origins: Float[Tensor, "ray 3"], directions: Float[Tensor, "ray 3"], time: float
) -> tuple[Float[Tensor, "ray"], Int[Tensor, "ray"]]:
    """Distance to the first surface (infinite where there is none) and its number (-1)."""
    nearest = torch.full(origins.shape[:1], torch.inf)
    number = torch.full(origins.shape[:1], -1)
    for index, surface in enumerate(world.surfaces):
        center, right = moved_center(surface, time), vector(surface.right)
        offset = origins - center
        if surface.up is None:
            radius = right.norm()
            half_b = (offset * directions).sum(-1)
            discriminant = half_b.square() - offset.square().sum(-1) + radius**2
            t = -half_b - discriminant.clamp_min(0).sqrt()
            valid = discriminant > 0
        else:
            up = vector(surface.up)
            normal = F.normalize(torch.linalg.cross(right, up), dim=0)
            along = directions @ normal
            t = -(offset @ normal) / torch.where(along.abs() < 1e-9, torch.full_like(along, 1e-9), along)
            point = offset + t[:, None] * directions
            valid = ((point @ right).abs() <= right @ right) & ((point @ up).abs() <= up @ up)
        closer = valid & (t > 1e-3) & (t < nearest)
        nearest, number = torch.where(closer, t, nearest), torch.where(closer, index, number)
    return nearest, number


def vector(numbers: tuple[float, float, float]) -> Float[Tensor, "3"]:
    """Three numbers as a tensor, whole ones too."""
    return torch.tensor(numbers, dtype=torch.float32)


def moved_center(surface: Surface, time: float) -> Float[Tensor, "3"]:
    """Where the surface's centre is in photo number ``time``."""
    return vector(surface.center) + time * vector(surface.motion)


def colours(
    world: World,
    textures: Float[Tensor, "texture 3 size size"],
    origins: Float[Tensor, "ray 3"],
    directions: Float[Tensor, "ray 3"],
    time: float,
    bounces: int = 1,
) -> Float[Tensor, "ray 3"]:
    """Colour along each ray; a mirror shows what the reflected ray sees."""
    t, number = hits(world, origins, directions, time)
    result = sky_colour(directions) if world.sky else torch.zeros_like(directions)
    light = F.normalize(vector(LIGHT), dim=0)
    for index, surface in enumerate(world.surfaces):
        mine = (number == index).nonzero()[:, 0]
        if not len(mine):
            continue
        point = origins[mine] + t[mine, None] * directions[mine]
        normal, uv = normal_and_uv(surface, point, time)
        normal = torch.where((normal * directions[mine]).sum(-1, keepdim=True) > 0, -normal, normal)
        reflected = directions[mine] - 2 * (directions[mine] * normal).sum(-1, keepdim=True) * normal
        if surface.kind == "mirror" and bounces:
            result[mine] = 0.92 * colours(world, textures, point + 1e-3 * normal, reflected, time, bounces - 1)
            continue
        grid = (uv - uv.floor()) * 2 - 1
        albedo = F.grid_sample(
            textures[None, surface.texture], grid[None, None], padding_mode="border", align_corners=False
        )[0, :, 0].T
        shaded = albedo * (0.65 + 0.35 * (normal @ light).clamp_min(0))[:, None]
        if surface.kind == "glossy":
            shaded = 0.7 * shaded + 0.9 * (reflected @ light).clamp_min(0)[:, None] ** 12
        result[mine] = shaded
    return result.clamp(0, 1)


def normal_and_uv(
    surface: Surface, point: Float[Tensor, "ray 3"], time: float
) -> tuple[Float[Tensor, "ray 3"], Float[Tensor, "ray 2"]]:
    """Unit normals and texture coordinates of points on a surface."""
    right = vector(surface.right)
    local = point - moved_center(surface, time)
    if surface.up is None:
        normal = F.normalize(local, dim=-1)
        azimuth = torch.atan2(normal[:, 0], -normal[:, 2]) / math.pi
        return normal, torch.stack([azimuth, normal[:, 1].clamp(-1, 1).asin() * 2 / math.pi], -1) * surface.tiles
    up = vector(surface.up)
    normal = F.normalize(torch.linalg.cross(right, up), dim=0).expand_as(point)
    ratio = right.norm() / up.norm()
    uv = torch.stack([(local @ right) / (right @ right) * ratio.clamp_max(8), (local @ up) / (up @ up)], -1)
    return normal, uv * surface.tiles * 0.5


def sky_colour(directions: Float[Tensor, "ray 3"]) -> Float[Tensor, "ray 3"]:
    """Blue, paler towards the horizon, with faint clouds: hardly anything to match."""
    height = (-directions[:, 1]).clamp(0, 1)[:, None]
    blue = torch.tensor([0.86, 0.91, 0.96]) + height.sqrt() * torch.tensor([-0.5, -0.34, -0.1])
    x, y, z = directions.unbind(-1)
    clouds = (9 * x + 4 * (7 * y).sin()).sin() * (11 * y + 3 * (5 * z + 6 * x).sin()).sin()
    return (blue + 0.05 * clouds.clamp_min(0)[:, None]).clamp(0, 1)


@dataclass(frozen=True)
class LimitCase:
    """A target, its sources and the truth.

    Attributes:
        numbers: which surface each target pixel shows; -1 none (the sky).
        depth: exact z of the target's pixel centres, 0 where there is no surface.
    """

    source: Views
    target: Cameras
    image: Float[Tensor, "3 height width"]
    depth: Float[Tensor, "height width"]
    numbers: Int[Tensor, "height width"]

    def shows(self, *surfaces: int) -> Bool[Tensor, "height width"]:
        """Pixels that show one of these surfaces."""
        return torch.isin(self.numbers, torch.tensor(surfaces))


def photograph(world: World, cameras: Cameras, textures: Tensor, time: float) -> Float[Tensor, "3 height width"]:
    """The picture of one camera: mean of ``SUPERSAMPLE``^2 rays a pixel."""
    width, height = cameras.size
    total = torch.zeros(height * width, 3)
    steps = (torch.arange(SUPERSAMPLE) + 0.5) / SUPERSAMPLE
    v, u = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    corners = torch.stack([u, v], -1).reshape(-1, 2).float()
    for dx in steps:
        for dy in steps:
            rays = rays_at_pixels(cameras, corners + torch.stack([dx, dy]))
            total += colours(world, textures, rays.origins, rays.directions, time)
    return (total / SUPERSAMPLE**2).T.reshape(3, height, width)


def limit_case(
    world: World, num_sources: int = 3, degrees: float = 6.0, size: tuple[int, int] = (288, 208)
) -> LimitCase:
    """Photograph ``world`` from a ring of sources and from the target in its middle.

    The target is taken at time 0, source i at time i + 1.
    """
    cameras, textures = ring(num_sources, degrees, size), texture_bank()
    images = torch.stack([photograph(world, cameras[i], textures, float(i)) for i in range(num_sources + 1)])
    width, height = size
    v, u = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    rays = rays_at_pixels(cameras[0], torch.stack([u, v], -1).reshape(-1, 2))
    t, number = hits(world, rays.origins, rays.directions, 0.0)
    depth = torch.where(number >= 0, t * rays.cos, torch.zeros_like(t))
    return LimitCase(
        Views(images[1:], cameras[1:]),
        cameras[0],
        images[0],
        depth.reshape(height, width),
        number.reshape(height, width),
    )
