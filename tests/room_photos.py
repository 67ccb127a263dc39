"""Photos of a corner of a painted room: exact cameras, rich texture, any viewpoint. For the tests of
finding poses, which need to place the camera themselves (turning on the spot, two rooms, a lens).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from idnerf.data.distortion import Lens, distort

FOCAL_RATIO = 0.8
"""Focal length over the width."""


@dataclass(frozen=True, eq=False)
class Room:
    """Planes n . x = d with a painting each; the nearest one in front is seen. The camera stands near the origin."""

    seed: int = 0

    @property
    def planes(self) -> list[tuple[np.ndarray, float]]:
        normals = np.array([[0.25, 0.0, 1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.1], [0.3, -1.0, -0.2]])
        distances = [4.5, 1.3, 2.2, 2.4]
        return [(n / np.linalg.norm(n), d) for n, d in zip(normals, distances, strict=True)]

    def painting(self, number: int) -> torch.Tensor:
        """[1, 1, 1024, 1024] grey: noise of all scales, sharpened into patches, so that corners are found."""
        generator = torch.Generator().manual_seed(100 * self.seed + number)
        total = torch.zeros(1, 1, 1024, 1024)
        for cells in (8, 24, 64, 160, 400):
            noise = torch.rand(1, 1, cells, cells, generator=generator) - 0.5
            total += F.interpolate(noise, size=(1024, 1024), mode="bilinear", align_corners=False) * cells**-0.15
        return torch.sigmoid(5 * total)

    def photo(self, c2w: np.ndarray, size: tuple[int, int], k1: float = 0.0) -> np.ndarray:
        """uint8 RGB as a camera of focal length 0.8 x width sees the room, 2x2 rays a pixel."""
        width, height = size
        v, u = np.meshgrid((np.arange(2 * height) + 0.5) / 2, (np.arange(2 * width) + 0.5) / 2, indexing="ij")
        bent = np.stack([u - width / 2, v - height / 2], -1) / (FOCAL_RATIO * width)
        ideal = torch.from_numpy(bent)
        for _ in range(20 if k1 else 0):
            ideal = ideal + torch.from_numpy(bent) - distort(ideal, Lens("perspective", (k1,)))
        rays = np.concatenate([ideal.numpy(), np.ones((*ideal.shape[:2], 1))], -1) @ c2w[:3, :3].T
        nearest, grey = np.full(rays.shape[:2], np.inf), np.full(rays.shape[:2], 0.5)
        for number, (normal, distance) in enumerate(self.planes):
            along = rays @ normal
            t = np.where(along > 1e-6, (distance - c2w[:3, 3] @ normal) / np.maximum(along, 1e-6), np.inf)
            hit = (t > 0) & (t < nearest)
            points = c2w[:3, 3] + rays * np.where(np.isfinite(t), t, 0)[..., None]
            across = np.cross(normal, [0.3, 0.5, 0.81])
            across /= np.linalg.norm(across)
            grid = np.stack([points @ across, points @ np.cross(normal, across)], -1) / 6
            seen = F.grid_sample(self.painting(number), torch.from_numpy(grid).float()[None], align_corners=False)
            nearest, grey = np.where(hit, t, nearest), np.where(hit, seen[0, 0].numpy(), grey)
        pixels = grey.reshape(height, 2, width, 2).mean((1, 3))
        return (np.stack([pixels, pixels**1.3, pixels**0.8], -1) * 255).round().astype(np.uint8)


def pose(center: tuple[float, float, float], yaw_degrees: float = 0.0, pitch_degrees: float = 0.0) -> np.ndarray:
    """c2w, OpenCV axes, looking along z when both angles are 0."""
    a, b = np.radians([yaw_degrees, pitch_degrees])
    yaw = np.array([[np.cos(a), 0, np.sin(a)], [0, 1, 0], [-np.sin(a), 0, np.cos(a)]])
    pitch = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    c2w = np.eye(4)
    c2w[:3, :3], c2w[:3, 3] = yaw @ pitch, center
    return c2w


WALK = [pose((-0.4, 0.0, 0.0), 5.0), pose((0.0, -0.1, 0.15), 0.0, -2.0), pose((0.45, 0.05, 0.0), -6.0, 1.0)]
"""Three cameras side by side."""


def save_photos(folder: Path, poses: list[np.ndarray], size: tuple[int, int], room: Room | None = None) -> Path:
    """Photos as PNG, named photo_0.png, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, c2w in enumerate(poses):
        Image.fromarray((room or Room()).photo(c2w, size)).save(folder / f"photo_{number}.png")
    return folder
