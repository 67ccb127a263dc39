"""Camera rigs with the baselines of LLFF (forward-facing) and of DTU and Blender (inward-facing).

Scenes are laid out in units where things start at a distance of about 1 from the cameras; the world's y
points down.
"""

import math
import random
from dataclasses import dataclass

import numpy as np
import torch

from idnerf.data.procedural.raster import Pinhole


@dataclass(frozen=True)
class Rig:
    """Cameras and the space they look at.

    Attributes:
        kind: "forward" or "inward".
        near, far: depth range meant for the scene's content.
        tan_x, tan_y: half extent of the image at depth 1.
        baseline: typical distance of neighbouring cameras.
    """

    kind: str
    cameras: tuple[Pinhole, ...]
    near: float
    far: float
    tan_x: float
    tan_y: float
    baseline: float

    @property
    def centers(self) -> np.ndarray:
        return np.stack([c.c2w[:3, 3].numpy() for c in self.cameras])


def loguniform(rng: random.Random, low: float, high: float) -> float:
    """A number whose logarithm is uniform."""
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def look_at(position: np.ndarray, target: np.ndarray, roll: float) -> torch.Tensor:
    """c2w (OpenCV axes) of a camera at ``position`` looking at ``target``; the world's y points down."""
    forward = (target - position) / np.linalg.norm(target - position)
    right = np.cross(np.array([0.0, 1.0, 0.0]), forward)
    right /= np.linalg.norm(right)
    down = np.cross(forward, right)
    right, down = (
        right * math.cos(roll) + down * math.sin(roll),
        down * math.cos(roll) - right * math.sin(roll),
    )
    c2w = np.eye(4)
    c2w[:3] = np.stack([right, down, forward, position], 1)
    return torch.tensor(c2w, dtype=torch.float32)


def intrinsics(size: tuple[int, int], tan_x: float, rng: random.Random) -> torch.Tensor:
    focal = 0.5 * size[0] / tan_x
    cx = 0.5 * size[0] * (1 + rng.gauss(0, 0.006))
    cy = 0.5 * size[1] * (1 + rng.gauss(0, 0.006))
    return torch.tensor([[focal, 0, cx], [0, focal * math.exp(rng.gauss(0, 0.003)), cy], [0, 0, 1]])


def jittered_grid(count: int, rng: random.Random) -> list[tuple[float, float]]:
    """``count`` positions about one apart around the origin, in random order."""
    columns = math.ceil(math.sqrt(1.6 * count))
    rows = math.ceil(count / columns)
    cells = [(c, r) for r in range(rows) for c in range(columns)]
    rng.shuffle(cells)
    return [
        (c - (columns - 1) / 2 + rng.uniform(-0.35, 0.35), r - (rows - 1) / 2 + rng.uniform(-0.35, 0.35))
        for c, r in cells[:count]
    ]


def forward_rig(size: tuple[int, int], count: int, rng: random.Random) -> Rig:
    """Cameras on a wobbly patch of a plane, all facing a scene between depth 1 and ``far``.

    Images are crops of larger ones with 40 to 75 degrees of view, so that disparities in pixels match theirs.
    """
    whole = math.tan(math.radians(rng.uniform(40, 75)) / 2)
    tan_x = max(whole / loguniform(rng, 1.0, 2.8), math.tan(math.radians(24) / 2))
    far = loguniform(rng, 1.8, 15.0)
    # Neighbours share most of what they see, also in narrow crops.
    baseline = loguniform(rng, 0.03, min(0.25, 0.6 * tan_x))
    focus = loguniform(rng, min(1.5, 0.9 * far), far)
    cameras = []
    for x, y in jittered_grid(count, rng):
        position = np.array([x * baseline, y * baseline, rng.gauss(0, 0.25) * baseline])
        target = np.array([0.0, 0.0, focus]) + focus * np.array([rng.gauss(0, 0.02), rng.gauss(0, 0.02), 0])
        if rng.random() < 0.3:
            target = target + np.array([0.6 * position[0], 0.6 * position[1], 0])
        cameras.append(Pinhole(look_at(position, target, rng.gauss(0, 0.02)), intrinsics(size, tan_x, rng), size))
    return Rig("forward", tuple(cameras), 1.0, far, tan_x, tan_x * size[1] / size[0], baseline)


def inward_rig(size: tuple[int, int], count: int, rng: random.Random) -> Rig:
    """Cameras on the cap of a sphere around an object group of radius 1 at the origin.

    Half of the rigs see a crop: the objects exceed the frame, as in a part of a larger image.
    """
    tan_x = math.tan(math.radians(rng.uniform(25, 60)) / 2)
    tan_y = tan_x * size[1] / size[0]
    distance = 1 / math.sin(math.atan(min(tan_x, tan_y))) * rng.uniform(0.75, 1.25)
    distance = max(distance, 1.9)
    crop = loguniform(rng, 0.4, 1.0) if rng.random() < 0.5 else 1.0
    tan_x, tan_y = tan_x * crop, tan_y * crop
    positions = jittered_grid(count, rng)
    reach = max(math.hypot(x, y) for x, y in positions)
    # ``reach`` is half of the largest angle between two views: 60 degrees, up to 90 in one rig of six.
    widest = math.radians(45 if rng.random() < 1 / 6 else 30)
    spacing = min(math.radians(loguniform(rng, 5.0, 40.0)), widest / max(reach, 1e-6))
    azimuth, elevation = rng.uniform(0, 2 * math.pi), math.radians(rng.uniform(8, 50))
    astray = 0.08 + 0.25 * (1 - crop)
    aim = np.array([rng.gauss(0, astray), rng.gauss(0, astray), rng.gauss(0, astray)])
    cameras = []
    for x, y in positions:
        e = min(max(elevation + y * spacing, math.radians(2)), math.radians(80))
        a = azimuth + x * spacing / max(math.cos(elevation), 0.5)
        outward = np.array([math.cos(e) * math.sin(a), -math.sin(e), math.cos(e) * math.cos(a)])
        position = outward * distance * math.exp(rng.gauss(0, 0.03))
        target = aim + crop * np.array([rng.gauss(0, 0.03), rng.gauss(0, 0.03), rng.gauss(0, 0.03)])
        cameras.append(Pinhole(look_at(position, target, rng.gauss(0, 0.02)), intrinsics(size, tan_x, rng), size))
    return Rig("inward", tuple(cameras), distance - 1.0, distance + 1.0, tan_x, tan_y, spacing * distance)


def draw_rig(kind: str, size: tuple[int, int], count: int, rng: random.Random) -> Rig:
    """A rig of the kind, "mixed" draws one (60 % forward-facing)."""
    if kind == "mixed":
        kind = "forward" if rng.random() < 0.6 else "inward"
    return forward_rig(size, count, rng) if kind == "forward" else inward_rig(size, count, rng)
