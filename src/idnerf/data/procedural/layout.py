"""Putting a scene together in front of a rig: enclosure, ground, objects at many depths, lights."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from idnerf.data.procedural.assemblies import add_big_leaves, add_cables
from idnerf.data.procedural.atlas import build_atlas
from idnerf.data.procedural.builder import BOX, CYLINDER, SceneBuilder, upright_rotation
from idnerf.data.procedural.masks import outline_bank, relief_bank
from idnerf.data.procedural.objects import add_beams, add_column, add_fence, add_wire
from idnerf.data.procedural.primitives import Primitives
from idnerf.data.procedural.raster import Pinhole
from idnerf.data.procedural.rigs import Rig, loguniform, look_at
from idnerf.data.procedural.shading import Appearance, Light
from idnerf.data.procedural.textures import FAMILIES, random_colour, texture_bank
from idnerf.data.procedural.themes import INTERIOR, SIMPLE_OBJECTS, THEMES

TEXTURE_SIZE = 256
MAP_SIZE = 128
RELIEFS = 3
SHADOW_SIZE = 320
SKY_SIZE = 128

Maker = Callable[[SceneBuilder, np.ndarray, float], None]


@dataclass(frozen=True)
class World:
    """Everything that can be rendered. Lights have no shadow maps yet; ``shadow_cameras`` and
    ``sky_cameras`` say how to make them.

    Attributes:
        backdrop: colour (as displayed) that replaces the enclosure, as in renderings cut out of their
            background; None where the enclosure is seen.
        content_far: depth beyond which only the enclosure lies (sky, backdrop).
    """

    primitives: Primitives
    appearance: Appearance
    outlines: Float[Tensor, "outline size size"]
    shadow_cameras: tuple[Pinhole, ...]
    sky_cameras: tuple[Pinhole, ...]
    backdrop: tuple[float, float, float] | None = None
    content_far: float = math.inf


def choose_families(complexity: float, rng: random.Random) -> list[str]:
    """Texture families of a scene: some always there, the rest drawn."""
    count = 6 + round(10 * complexity)
    fixed = ["noise", "collage", "plain", "white", "leaf", "leaf", "petal"]
    others = [name for name in FAMILIES if name not in ("leaf", "petal", "white")]
    extra = ["leaf"] if complexity > 0.4 else []
    return fixed + extra + [rng.choice(others) for _ in range(count)]


def six_materials(builder: SceneBuilder, tiles: float, outdoors: bool) -> list[int]:
    """Walls of an enclosure (faces -x +x -y +y -z +z; -y is the ceiling or sky, +y the floor)."""
    rng = builder.rng
    wall = rng.choice(["plain", "plain", "white", "brick", "noise", "collage", "wood", "stripe", "rust", None])
    materials = []
    for face in range(6):
        sky = outdoors and face != 3
        if outdoors:
            family = "collage" if face != 2 and rng.random() < 0.6 else rng.choice(["noise", "rust", "collage", None])
        elif face in (2, 3):
            family = rng.choice(["plain", "white", "wood", "noise", "cell", "checker", "speckle", None])
        else:
            family = wall if rng.random() < 0.6 else rng.choice(["plain", "collage", None])
        materials.append(builder.material(family, tiles * rng.uniform(0.6, 1.6), rng.uniform(0.2, 0.8) if sky else 0.0))
    return materials


def draw_place(rig: Rig, rng: random.Random) -> tuple[str, tuple[float, float, float] | None]:
    """Where the scene is ("indoors", "outdoors", "studio") and the backdrop of a studio, ``draw_backdrop``."""
    place = rng.choices(["indoors", "outdoors", "studio"], [4, 4, 6 if rig.kind == "inward" else 0.6])[0]
    return place, draw_backdrop(rng) if place == "studio" else None


def draw_backdrop(rng: random.Random) -> tuple[float, float, float] | None:
    """Backdrop of a studio: exactly white or black as cut-out renderings are, an even tint, or None (a lit cove)."""
    kind = rng.choices(["white", "black", "grey", "tint", "cove"], [40, 18, 12, 10, 20])[0]
    if kind == "cove":
        return None
    if kind == "tint":
        red, green, blue = random_colour(rng)
        return red, green, blue
    level = {"white": 1.0, "black": 0.0, "grey": rng.uniform(0.1, 0.9)}[kind]
    return level, level, level


def studio_materials(builder: SceneBuilder) -> list[int]:
    """One even colour all around, white or black more often than not: renderings and product photos."""
    rng = builder.rng
    level = rng.choice([0.0, 0.0, 1.0, 1.0, 1.0, rng.random()])
    return [builder.material("plain", tiles=1.0, emission=1.0, even=level) for _ in range(6)]


def add_enclosure(builder: SceneBuilder, rig: Rig, kind: str, sunk: float = 0.0) -> float:
    """The room or the far backdrop: rays always end. Returns the height (y) at which things stand.

    ``kind``: "indoors", "outdoors" or "studio"; ``sunk``: how far below that the enclosure ends.
    """
    rng = builder.rng
    outdoors = kind == "outdoors"
    if rig.kind == "inward":
        reach = float(np.linalg.norm(rig.centers, axis=1).max()) * loguniform(rng, 1.15, 8.0 if outdoors else 3.5)
        floor = rng.uniform(0.3, 0.8)
        half = np.array([reach, 0.5 * (floor + sunk + reach), reach])
        center = np.array([0.0, floor + sunk - half[1], 0.0])
        shape = BOX if rng.random() < 0.7 else (1.0, 0.0, 0.0)
    else:
        # The floor's near edge leaves the image at depth z_floor; between near and the back wall.
        back = rig.far * (
            (rng.uniform(1, 2) if rng.random() < 0.5 else loguniform(rng, 2.0, 12.0)) if outdoors else 1.0
        )
        z_floor = loguniform(rng, 1.1, max(0.8 * rig.far, 1.2))
        floor = z_floor * rig.tan_y
        side = rng.uniform(0.5, 1.6) * rig.tan_x * back
        ceiling = rng.uniform(0.35, 1.2) * rig.tan_y * back
        side, ceiling = max(side, 0.6 + rig.baseline * 4), max(ceiling, 0.6 + rig.baseline * 4)
        floor = max(floor, 0.35 + rig.baseline * 3)
        behind = rng.uniform(2.0, 5.0)
        center = np.array([rng.uniform(-0.2, 0.2) * side, 0.5 * (floor + sunk - ceiling), 0.5 * (back - behind)])
        half = np.array([1.2 * side, 0.5 * (floor + sunk + ceiling), 0.5 * (back + behind)])
        shape = BOX if not outdoors or rng.random() < 0.5 else (0.6, 0.55, 0.0)
    tiles = loguniform(rng, 0.7, 3.0) / float(half.max())
    walls = studio_materials(builder) if kind == "studio" else six_materials(builder, tiles, outdoors)
    builder.add_room(center, half, shape, walls)
    return floor


def object_place(
    builder: SceneBuilder, rig: Rig, floor: float, sizes: tuple[float, float], grounded: float
) -> tuple[np.ndarray, float]:
    """Where to put an object, and how large: even in the image and in inverse depth, or on the floor.

    ``sizes``: range of its size in half widths of the image; ``grounded``: share that stands on the floor.
    """
    rng = builder.rng
    if rig.kind == "inward":
        size = loguniform(rng, 0.15, 0.6)
        radius, angle = (1 - 0.6 * size) * math.sqrt(rng.random()), rng.uniform(0, 2 * math.pi)
        y = floor - 0.6 * size if rng.random() < 1.5 * grounded else rng.uniform(-0.6, floor)
        return np.array([radius * math.cos(angle), y, radius * math.sin(angle)]), size
    z = 1 / rng.uniform(1 / (0.95 * rig.far), 1 / 1.15)
    size = max(loguniform(rng, *sizes) * z * rig.tan_x, 0.02)
    z = max(z, 1.0 + 1.3 * size)
    x = z * rig.tan_x * rng.uniform(-1.1, 1.1)
    y = z * rig.tan_y * rng.uniform(-1.1, 1.1)
    if rng.random() < grounded or y > floor:
        y = floor - 0.7 * size
    return np.array([x, y, z]), size


def add_ground(builder: SceneBuilder, rig: Rig, floor: float) -> None:
    """A height field on the floor: earth, snow, rubble."""
    rng = builder.rng
    if rig.kind == "inward":
        reach, middle = rng.uniform(1.0, 1.6), np.zeros(3)
    else:
        reach = rng.uniform(0.4, 0.9) * rig.far
        middle = np.array([0.0, 0.0, 1.0 + reach])
    tall = rng.uniform(0.03, 0.12) * reach
    up = np.array([[1.0, 0, 0], [0, 0, -1.0], [0, 1.0, 0]])
    material = builder.material(
        rng.choice(["noise", "rust", "cell", "speckle", "collage"]), loguniform(rng, 0.5, 2.5) / reach
    )
    builder.add_relief(middle + np.array([0, floor, 0]), up, (reach, reach, tall), rng.randrange(RELIEFS), material)


def add_table_top(builder: SceneBuilder, floor: float) -> None:
    """A board or turntable under the objects of a studio."""
    rng = builder.rng
    half = np.array([rng.uniform(0.8, 1.4), rng.uniform(0.7, 1.3), rng.uniform(0.02, 0.1)])
    shape = BOX
    if rng.random() < 0.35:
        half[1], shape = half[0], CYLINDER
    family = rng.choice(["plain", "white", "wood", "noise", "weave", None])
    material = builder.material(family, tiles=rng.uniform(0.3, 1.2))
    builder.add_body(np.array([0.0, floor + half[2], 0.0]), upright_rotation(rng), half, shape, material)


def add_near_occluder(builder: SceneBuilder, rig: Rig) -> None:
    """Something just before the cameras that crosses the frame: a post, a bar, cables, a leaf, a fence."""
    rng = builder.rng
    makers = (add_column, add_beams, add_cables, add_big_leaves, add_wire, add_fence)
    z = rng.uniform(1.0, 1.5)
    size = z * rig.tan_x * rng.uniform(0.25, 0.7)
    x, y = rng.uniform(-0.9, 0.9) * z * rig.tan_x, rng.uniform(-0.6, 0.6) * z * rig.tan_y
    rng.choice(makers)(builder, np.array([x, y, z]), min(size, 0.35))


def draw_lights(
    middle: np.ndarray, reach: float, softness: float, rng: random.Random
) -> tuple[list[Light], list[Pinhole]]:
    """One to three lights, mostly from above and the cameras' side, and cameras for their shadow maps.

    ``softness`` in [0, 1]: 1 leaves hardly more than the ambient light of an overcast sky.
    """
    lights, cameras = [], []
    for i in range(rng.choice([1, 1, 2, 2, 3])):
        direction = np.array([rng.gauss(0, 0.8), -abs(rng.gauss(1.0, 0.5)), rng.gauss(-0.5, 0.7)])
        direction /= np.linalg.norm(direction)
        distance = reach * rng.choice([rng.uniform(1.3, 2.0), rng.uniform(3, 10)])
        position = middle + direction * distance
        warm = rng.gauss(0, 0.15)
        strength = (1.0 if i == 0 else rng.uniform(0.2, 0.7)) * rng.uniform(0.6, 1.8) * (1 - 0.85 * softness)
        colour = strength * np.array([math.exp(warm), 1.0, math.exp(-warm)])
        tensor = torch.tensor(position, dtype=torch.float32)
        lights.append(Light(tensor, torch.tensor(colour, dtype=torch.float32), distance, None))
        tangent = min(reach / math.sqrt(max(distance**2 - reach**2, 1e-6)), 1.6)
        focal = 0.5 * SHADOW_SIZE / tangent
        K = torch.tensor([[focal, 0, SHADOW_SIZE / 2], [0, focal, SHADOW_SIZE / 2], [0, 0, 1]])
        c2w = look_at(position, middle + 1e-3, rng.uniform(0, 6))
        cameras.append(Pinhole(c2w, K, (SHADOW_SIZE, SHADOW_SIZE)))
    return lights, cameras


def sky_cameras(middle: np.ndarray, reach: float, rng: random.Random, count: int = 4) -> list[Pinhole]:
    """Where to look at the scene from to see which points the ambient light reaches (ambient occlusion)."""
    K = torch.tensor([[1.5 * SKY_SIZE, 0, SKY_SIZE / 2], [0, 1.5 * SKY_SIZE, SKY_SIZE / 2], [0, 0, 1]])
    cameras = []
    for i in range(count):
        azimuth = 2 * math.pi * (i + rng.random()) / count
        direction = np.array([math.cos(azimuth), -rng.uniform(0.4, 1.5), math.sin(azimuth) - 0.5])
        direction /= np.linalg.norm(direction)
        c2w = look_at(middle + 3.2 * reach * direction, middle, rng.uniform(0, 6))
        cameras.append(Pinhole(c2w, K, (SKY_SIZE, SKY_SIZE)))
    return cameras


def scene_extent(builder: SceneBuilder, rig: Rig) -> tuple[np.ndarray, float]:
    """Middle and radius of most of the primitives."""
    middles, radii = builder.bounding_spheres()
    focus = np.median(middles, axis=0) if rig.kind == "forward" else np.zeros(3)
    return focus, float(np.quantile(np.linalg.norm(middles - focus, axis=1) + radii, 0.9))


def fill(builder: SceneBuilder, rig: Rig, floor: float, complexity: float, interior: bool = False) -> None:
    """Place objects until the budget of primitives is spent."""
    rng = builder.rng
    theme = "interior" if interior else rng.choices(list(THEMES), [1.2, 1.7, 1.0, 1.0, 0.7])[0]
    weights = (
        INTERIOR
        if interior
        else {
            f: (1 - complexity) * SIMPLE_OBJECTS.get(f, 0.0) + complexity * THEMES[theme].get(f, 0.0)
            for f in SIMPLE_OBJECTS | THEMES[theme]
        }
    )
    # Even within a theme, a scene repeats a few kinds of objects.
    weights = {f: w * math.exp(rng.gauss(0, 0.7)) for f, w in weights.items()}
    makers, odds = list(weights), list(weights.values())
    budget = round(10 + 80 * complexity + 80 * complexity**2)
    sizes, grounded = (0.15, rng.uniform(0.4, 0.9)), 0.4
    if theme == "thicket":
        # Foliage fills the picture, floor or not.
        budget, sizes, grounded = round(20 + 290 * complexity**0.7), (0.3, rng.uniform(0.6, 0.9)), 0.1
    if rng.random() < 0.85:
        place_main_object(builder, rig, floor, rng.choices(makers, odds)[0])
    for _ in range(90):
        if len(builder) >= budget:
            break
        place, size = object_place(builder, rig, floor, sizes, grounded)
        rng.choices(makers, odds)[0](builder, place, size)


def place_main_object(builder: SceneBuilder, rig: Rig, floor: float, maker: Maker) -> None:
    """What the photos are of: large, near the middle, not far."""
    rng = builder.rng
    if rig.kind == "inward":
        size = rng.uniform(0.45, 0.8)
        maker(builder, np.array([rng.gauss(0, 0.1), floor - size, rng.gauss(0, 0.1)]), size)
        return
    z = rng.uniform(1.4, 2.6)
    size = 0.35 * z * rig.tan_x * rng.uniform(0.8, 2.4)
    z = max(z, 1 + 1.3 * size)
    maker(builder, np.array([rng.gauss(0, 0.4) * size, rng.gauss(0, 0.2) * size, z]), size)


def draw_ambient(rng: random.Random) -> Float[Tensor, "4 3"]:
    """Constant and gradient of the ambient light; more of it from above."""
    base = loguniform(rng, 0.15, 0.8)
    tint = torch.tensor([math.exp(rng.gauss(0, 0.08)) for _ in range(3)])
    gradient = torch.tensor([rng.gauss(0, 0.2), rng.uniform(-0.6, 0.0), rng.gauss(-0.15, 0.2)])
    colour = base * tint * torch.tensor([[math.exp(rng.gauss(0, 0.08)) for _ in range(3)] for _ in range(4)])
    return torch.cat([colour[:1], colour[1:] * gradient[:, None]])


def draw_world(
    rig: Rig, complexity: float, rng: random.Random, generator: torch.Generator, interior: bool = False
) -> World:
    """A random scene for the rig; ``complexity`` in [0, 1]; ``interior``: a room of ``themes.INTERIOR``."""
    families = choose_families(complexity, rng)
    builder = SceneBuilder(families, rng, complexity)
    if rng.random() < 0.2:
        builder.choose_favourite()
    place, backdrop = ("indoors", None) if interior else draw_place(rig, rng)
    # Cut-out renderings have no floor: the enclosure ends lower, also so as not to coincide with a table's top.
    floor = add_enclosure(builder, rig, place, sunk=0.0 if backdrop is None else 1.0)
    if place != "studio" and rng.random() < 0.15 + 0.25 * complexity:
        add_ground(builder, rig, floor)
    if backdrop is not None and rig.kind == "inward" and rng.random() < 0.5:
        add_table_top(builder, floor)
    fill(builder, rig, floor, complexity, interior)
    if rig.kind == "forward" and rng.random() < 0.1 + 0.15 * complexity:
        add_near_occluder(builder, rig)
    middle, reach = scene_extent(builder, rig)
    softness = rng.random() ** 2 if rng.random() < 0.7 else 1.0
    lights, shadow_cameras = draw_lights(middle, reach, softness, rng)
    primitives, materials = builder.build()
    appearance = Appearance(
        build_atlas(texture_bank(families, TEXTURE_SIZE, rng, generator)),
        materials,
        tuple(lights),
        draw_ambient(rng),
        (),
        relief_bank(RELIEFS, MAP_SIZE, rng, generator),
        rng.choice([i for i, name in enumerate(families) if name in ("noise", "collage")]),
    )
    return World(
        primitives,
        appearance,
        outline_bank(MAP_SIZE, rng, generator),
        tuple(shadow_cameras),
        tuple(sky_cameras(middle, reach, rng)),
        backdrop,
        math.inf if place == "indoors" else 1.05 * rig.far,
    )
