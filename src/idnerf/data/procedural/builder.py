"""Collecting primitives and materials into tables."""

import math
import random

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from idnerf.data.procedural.masks import OUTLINES
from idnerf.data.procedural.primitives import BODY, CARVED, RELIEF, ROOM, SHEET, Primitives
from idnerf.data.procedural.rigs import loguniform
from idnerf.data.procedural.shading import MATERIAL_FIELDS

BOX = (0.0, 0.0, 0.0)
ELLIPSOID = (1.0, 1.0, 0.0)
CYLINDER = (1.0, 0.0, 0.0)
BARREL = (0.75, 0.35, 0.0)
PARABOLOID = (0.5, 0.0, 0.5)
ROUNDED = (0.55, 0.45, 0.0)
SHAPES = (BOX, BOX, ELLIPSOID, ELLIPSOID, CYLINDER, CYLINDER, BARREL, PARABOLOID, ROUNDED)


def random_rotation(rng: random.Random) -> np.ndarray:
    """Uniform over all rotations (Shoemake's quaternions)."""
    w, x, y, z = (rng.gauss(0, 1) for _ in range(4))
    n = math.sqrt(w * w + x * x + y * y + z * z)
    w, x, y, z = w / n, x / n, y / n, z / n
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def upright_rotation(rng: random.Random) -> np.ndarray:
    """Local z points up (world -y), turned about it at random."""
    a = rng.uniform(0, 2 * math.pi)
    x = np.array([math.cos(a), 0, math.sin(a)])
    up = np.array([0.0, -1.0, 0.0])
    return np.stack([x, np.cross(up, x), up], 1)


def frame_along(axis: np.ndarray, rng: random.Random) -> np.ndarray:
    """Local z along ``axis``, turned about it at random."""
    z = axis / np.linalg.norm(axis)
    x = np.cross(z, np.array([rng.gauss(0, 1) for _ in range(3)]))
    x /= np.linalg.norm(x)
    return np.stack([x, np.cross(z, x), z], 1)


class SceneBuilder:
    """Grows a scene: ``add_*`` append primitives, ``material`` appends a material and returns its index."""

    def __init__(self, families: list[str], rng: random.Random, roughness: float) -> None:
        """``families``: names of the atlas's textures; ``roughness`` in [0, 1] scales bumps and detail.

        ``favourite`` (texture, tint) is what most surfaces are made of after ``choose_favourite``.
        """
        self.families = families
        self.rng = rng
        self.roughness = roughness
        self.favourite: tuple[int, list[float]] | None = None
        self.materials: list[list[float]] = []
        self.rows: list[tuple[int, list[tuple[np.ndarray, np.ndarray, np.ndarray, tuple[float, float, float], int]]]]
        self.rows = []
        self.face_materials: set[int] = set()

    def __len__(self) -> int:
        return len(self.rows)

    def material(
        self,
        family: str | None = None,
        tiles: float | None = None,
        emission: float = 0.0,
        even: float | None = None,
        paint: tuple[float, float, float] | None = None,
    ) -> int:
        """A random material.

        Args:
            family: texture family to prefer; any but leaves and petals when None.
            tiles: texture tiles per scene unit.
            emission: share of light of its own.
            even: grey level in [0, 1] of a surface without any texture; None for a textured one.
            paint: colour (RGB in [0, 1], as displayed) of an evenly painted surface.
        """
        rng = self.rng
        fitting = [i for i, name in enumerate(self.families) if name == family]
        if not fitting:
            fitting = [i for i, name in enumerate(self.families) if name not in ("leaf", "petal")]
        foliage = family in ("leaf", "petal")
        detail = [i for i, name in enumerate(self.families) if name in ("noise", "collage", "rust", "cell", "speckle")]
        angle = rng.choice([0.0, 0.0, math.pi / 2, rng.uniform(0, 6.28)])
        brightness = math.exp(rng.gauss(0, 0.25))
        tint = [brightness * math.exp(rng.gauss(0, 0.08)) for _ in range(3)]
        glossy = rng.random() < (0.5 if foliage else 0.35)
        polished = not foliage and emission == 0 and rng.random() < 0.14
        row = {
            "texture": rng.choice(fitting),
            "detail": rng.choice(detail),
            "scale": loguniform(rng, 0.35, 2.2) if tiles is None else tiles,
            "detail_scale": loguniform(rng, 1.5, 7.0) if rng.random() < 0.75 else loguniform(rng, 0.15, 0.6),
            "detail_strength": rng.choice([0.0, rng.uniform(0, 0.35), rng.uniform(0.2, 0.9) * self.roughness]),
            "cos": math.cos(angle),
            "sin": math.sin(angle),
            "offset_u": rng.random(),
            "offset_v": rng.random(),
            "red": tint[0],
            "green": tint[1],
            "blue": tint[2],
            "gloss": loguniform(rng, 0.02, 0.25) if glossy else 0.0,
            "shininess": loguniform(rng, 4.0, 120.0),
            "bump": loguniform(rng, 0.03, 0.35) * (0.4 + self.roughness) if rng.random() < 0.75 else 0.0,
            "emission": emission,
            "unit_uv": float(foliage),
            "translucency": rng.uniform(0.1, 0.5) if foliage else 0.0,
            "mirror": rng.choice([0.15, 0.4, 0.9]) * rng.uniform(0.5, 1.0) if polished else 0.0,
        }
        if polished:
            row["bump"] *= 0.15
        if self.favourite is not None and not foliage and emission == 0 and rng.random() < 0.75:
            shade = math.exp(rng.gauss(0, 0.08))
            texture, tint = self.favourite
            row |= {"texture": texture, "red": shade * tint[0], "green": shade * tint[1], "blue": shade * tint[2]}
        if even is not None:
            # Albedo is clamped to (0.005, 0.98): a factor of 100 or 0 drives any texture to an end.
            level = 100.0 if even == 1 else 2 * even
            row |= {
                "red": level,
                "green": level,
                "blue": level,
                "detail_strength": 0.0,
                "gloss": 0.0,
                "bump": 0.0,
            }
        if paint is not None:
            red, green, blue = (c**2.2 for c in paint)
            row |= {"texture": self.families.index("white"), "red": red, "green": green, "blue": blue}
            row |= {"detail_strength": rng.choice([0.0, 0.0, 0.15]), "bump": 0.1 * row["bump"]}
        self.materials.append([float(row[name]) for name in MATERIAL_FIELDS])
        return len(self.materials) - 1

    def choose_favourite(self) -> None:
        """From now on most surfaces are of one stuff: carved stone, a skeleton, a brick house."""
        rng = self.rng
        textures = [i for i, name in enumerate(self.families) if name not in ("leaf", "petal", "white", "glyph")]
        brightness = math.exp(rng.gauss(0, 0.25))
        self.favourite = rng.choice(textures), [brightness * math.exp(rng.gauss(0, 0.08)) for _ in range(3)]

    def _add(self, kind, center, rotation, half, shape, material, cut=None) -> None:
        first = (np.asarray(center, float), rotation, np.asarray(half, float), shape, material)
        self.rows.append((kind, [first, cut or first]))

    def add_body(self, center, rotation, half, shape, material: int) -> None:
        """A convex body (shapes: BOX, ELLIPSOID, CYLINDER, ...)."""
        self._add(BODY, center, rotation, half, shape, material)

    def add_carved(self, center, rotation, half, shape, material: int, cut_center, cut_rotation, cut_half, cut_shape):
        """A body with another one taken out; the hollow sometimes has a material of its own."""
        inner = self.material() if self.rng.random() < 0.3 else material
        cut = (np.asarray(cut_center, float), cut_rotation, np.asarray(cut_half, float), cut_shape, inner)
        self._add(CARVED, center, rotation, half, shape, material, cut)

    def add_sheet(self, center, rotation, half_x, half_y, bend: tuple[float, float], outline: str, material: int):
        """A thin bent patch; ``bend``: rise at the edges along x and y, in units of the half sizes."""
        depth_x, depth_y = bend[0] * half_x, bend[1] * half_y
        half_z = max(abs(depth_x) + abs(depth_y), 0.01 * max(half_x, half_y))
        choices = [i for i, name in enumerate(OUTLINES) if name == outline]
        shape = (depth_x / half_z, depth_y / half_z, float(self.rng.choice(choices)))
        self._add(SHEET, center, rotation, (half_x, half_y, half_z), shape, material)

    def add_relief(self, center, rotation, half, relief: int, material: int) -> None:
        """The solid under height map number ``relief``; heights run along local z."""
        self._add(RELIEF, center, rotation, half, (float(relief), 0.0, 0.0), material)

    def add_room(self, center, half, shape, materials: list[int]) -> None:
        """An enclosure seen from inside; ``materials``: six consecutive ones (faces -x +x -y +y -z +z)."""
        self.face_materials.add(len(self.rows))
        self._add(ROOM, center, np.eye(3), half, shape, materials[0])

    def bounding_spheres(self) -> tuple[np.ndarray, np.ndarray]:
        """Centres and radii of all primitives but rooms, for aiming lights."""
        rows = [r[1][0] for r in self.rows if r[0] != ROOM]
        if not rows:
            return np.zeros((1, 3)), np.ones(1)
        return np.stack([r[0] for r in rows]), np.array([np.linalg.norm(r[2]) for r in rows])

    def build(self) -> tuple[Primitives, Float[Tensor, "material field"]]:
        """The tables, primitives sorted by kind."""
        order = sorted(range(len(self.rows)), key=lambda i: self.rows[i][0])
        surfaces = [surface for i in order for surface in self.rows[i][1]]
        primitives = Primitives(
            kind=torch.tensor([self.rows[i][0] for i in order]),
            center=torch.tensor(np.stack([s[0] for s in surfaces]), dtype=torch.float32),
            rotation=torch.tensor(np.stack([s[1] for s in surfaces]), dtype=torch.float32),
            half=torch.tensor(np.stack([s[2] for s in surfaces]), dtype=torch.float32),
            shape=torch.tensor([s[3] for s in surfaces], dtype=torch.float32),
            material=torch.tensor([s[4] for s in surfaces]),
            per_face=torch.tensor([i in self.face_materials for i in order for _ in range(2)]),
        )
        return primitives, torch.tensor(self.materials).reshape(-1, len(MATERIAL_FIELDS))
