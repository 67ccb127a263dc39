"""Lens distortion, undone once where photos enter: behind this boundary every camera is a pinhole.

``perspective`` is Brown and Conrady's model as OpenCV and COLMAP write it (radial k1 k2 k3 k4 as a polynomial
in r^2, tangential p1 p2); ``fisheye`` is Kannala and Brandt's (k1..k4 as a polynomial in theta^2).
"""

import threading
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from idnerf.errors import InputError

MAX_ZOOM = 2.0
"""A lens that asks for more has coefficients that do not describe these photos."""


@dataclass(frozen=True)
class Lens:
    """Distortion coefficients. ``radial``: k1, k2, k3, k4 (missing ones are 0). ``tangential``: p1, p2."""

    model: Literal["perspective", "fisheye"]
    radial: tuple[float, ...] = ()
    tangential: tuple[float, float] = (0.0, 0.0)

    @property
    def is_pinhole(self) -> bool:
        """True when the lens changes nothing (a fisheye always does)."""
        return self.model == "perspective" and not any(self.radial) and not any(self.tangential)


def distort(points: Float[Tensor, "*point 2"], lens: Lens) -> Float[Tensor, "*point 2"]:
    """Where the lens puts ideal points; both in the normalised plane z = 1."""
    x, y = points[..., 0], points[..., 1]
    r2 = x * x + y * y
    if lens.model == "fisheye":
        r = r2.sqrt()
        theta = torch.atan(r)
        factor = theta * _polynomial(lens.radial, theta * theta) / r.clamp_min(1e-12)
        factor = torch.where(r > 1e-8, factor, torch.ones_like(factor))
        return points * factor[..., None]
    p1, p2 = lens.tangential
    factor = _polynomial(lens.radial, r2)
    return torch.stack(
        [
            x * factor + 2 * p1 * x * y + p2 * (r2 + 2 * x * x),
            y * factor + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y,
        ],
        -1,
    )


def _polynomial(coefficients: tuple[float, ...], square: Tensor) -> Tensor:
    """1 + c1 s + c2 s^2 + ..."""
    total = torch.zeros_like(square)
    for coefficient in reversed(coefficients):
        total = (total + coefficient) * square
    return 1 + total


def pinhole_intrinsics(lens: Lens, K: Float[Tensor, "3 3"], size: tuple[int, int]) -> Float[Tensor, "3 3"]:
    """Intrinsics of the undistorted image, which keeps the size and the principal point of the photo.

    fx and fy grow by one common factor, the smallest one (>= 1) for which every pixel of the undistorted
    image comes from inside the photo: no invalid border ever appears.

    Raises:
        InputError: coefficients that fold the image over itself.
    """
    return _zoomed(K, _zoom_without_border(lens, tuple(K.double().flatten().tolist()), size))


# Views usually share one lens, and its zoom is found once.
@lru_cache(maxsize=256)
def _zoom_without_border(lens: Lens, intrinsics: tuple[float, ...], size: tuple[int, int]) -> float:
    K = torch.tensor(intrinsics, dtype=torch.float64).reshape(3, 3)
    if _fills(lens, K, size, 1.0):
        return 1.0
    if not _fills(lens, K, size, MAX_ZOOM):
        raise InputError(
            f"{lens.model} distortion, radial {lens.radial}, tangential {lens.tangential}, folds the image "
            "over itself; check the coefficients"
        )
    low, high = 1.0, MAX_ZOOM
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if _fills(lens, K, size, middle) else (middle, high)
    return high


def _zoomed(K: Tensor, zoom: float) -> Tensor:
    return K * K.new_tensor([[zoom, zoom, 1.0], [1.0, zoom, 1.0], [1.0, 1.0, 1.0]])


def _fills(lens: Lens, K: Tensor, size: tuple[int, int], zoom: float) -> bool:
    """Whether the border pixels of the zoomed pinhole image land inside the photo, before the lens folds."""
    width, height = size
    u = torch.linspace(0.5, width - 0.5, min(width, 129), dtype=torch.float64)
    v = torch.linspace(0.5, height - 0.5, min(height, 129), dtype=torch.float64)
    border = torch.cat(
        [
            torch.stack([u, torch.full_like(u, 0.5)], -1),
            torch.stack([u, torch.full_like(u, height - 0.5)], -1),
            torch.stack([torch.full_like(v, 0.5), v], -1),
            torch.stack([torch.full_like(v, width - 0.5), v], -1),
        ]
    )
    points = _normalised(border, _zoomed(K.double(), zoom))
    inside = _pixels(distort(points, lens), K.double())
    tolerance = 1e-6
    if not ((inside > 0.5 - tolerance) & (inside < torch.tensor([width, height]) - 0.5 + tolerance)).all():
        return False
    radius = torch.linspace(0, float(torch.linalg.vector_norm(points, dim=-1).max()), 257, dtype=torch.float64)
    profile = distort(torch.stack([radius, torch.zeros_like(radius)], -1), Lens(lens.model, lens.radial))[:, 0]
    return bool((profile.diff() > 0).all())


def _normalised(pixels: Tensor, K: Tensor) -> Tensor:
    y = (pixels[..., 1] - K[1, 2]) / K[1, 1]
    x = (pixels[..., 0] - K[0, 2] - K[0, 1] * y) / K[0, 0]
    return torch.stack([x, y], -1)


def _pixels(points: Tensor, K: Tensor) -> Tensor:
    return points @ K[:2, :2].T + K[:2, 2]


def undistort(
    image: Float[Tensor, "channel height width"],
    lens: Lens,
    K: Float[Tensor, "3 3"],
    pinhole_K: Float[Tensor, "3 3"],
) -> Float[Tensor, "channel height width"]:
    """The photo as a pinhole camera with ``pinhole_K`` would have taken it (bicubic lookup, clamped to [0,
    1]).

    ``K`` and ``pinhole_K`` are in pixels of ``image``.
    """
    size = (image.shape[2], image.shape[1])
    matrices = [tuple(matrix.double().flatten().tolist()) for matrix in (K, pinhole_K)]
    with _MAKING_A_GRID:  # photos are decoded in threads, and the cache alone would let each of them make one
        grid = _lookup_grid(lens, *matrices, size)
    straight = F.grid_sample(image[None], grid[None], mode="bicubic", padding_mode="border", align_corners=False)
    return straight[0].clamp(0, 1)


_MAKING_A_GRID = threading.Lock()


# The views of a scene usually share one lens: the map is made once. Two entries, as large photos make large
# maps.
@lru_cache(maxsize=2)
def _lookup_grid(lens: Lens, K: tuple[float, ...], pinhole_K: tuple[float, ...], size: tuple[int, int]) -> Tensor:
    width, height = size
    v, u = torch.meshgrid(
        torch.arange(height, dtype=torch.float64) + 0.5,
        torch.arange(width, dtype=torch.float64) + 0.5,
        indexing="ij",
    )
    points = _normalised(torch.stack([u, v], -1), torch.tensor(pinhole_K, dtype=torch.float64).reshape(3, 3))
    pixels = _pixels(distort(points, lens), torch.tensor(K, dtype=torch.float64).reshape(3, 3))
    return (pixels * torch.tensor([2 / width, 2 / height], dtype=torch.float64) - 1).float()
