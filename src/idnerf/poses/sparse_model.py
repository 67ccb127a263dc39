"""What structure from motion gives: poses, one shared camera, 3D points and where each photo saw them."""

from dataclasses import dataclass, replace

import numpy as np

INLIER_PX = 4.0
"""Reprojection error at which an observation counts for nothing."""


@dataclass(frozen=True, eq=False)
class SparseModel:
    """A reconstruction, axes OpenCV's, pixel centres at +0.5, scene units arbitrary.

    The camera is one for all photos, principal point in the middle, SIMPLE_RADIAL: an ideal point (x, y) of the
    plane z = 1 lands at  focal (1 + k1 (x^2 + y^2)) (x, y) + size / 2.

    Attributes:
        photos: [view] which photos were registered, ascending.
        w2c: [view, 4, 4].
        size: (width, height) that the numbers in pixels are for.
        focal, k1: intrinsics.
        points: [point, 3] in the world.
        colors: [point, 3] uint8.
        view, point: [observation] indices into ``photos`` and ``points``.
        xy: [observation, 2] where it was seen, pixels.
    """

    photos: np.ndarray
    w2c: np.ndarray
    size: tuple[int, int]
    focal: float
    k1: float
    points: np.ndarray
    colors: np.ndarray
    view: np.ndarray
    point: np.ndarray
    xy: np.ndarray

    def __len__(self) -> int:
        return len(self.photos)

    @property
    def c2w(self) -> np.ndarray:
        """[view, 4, 4]."""
        return np.linalg.inv(self.w2c)

    @property
    def K(self) -> np.ndarray:
        """3x3, lens still in."""
        return np.array([[self.focal, 0, self.size[0] / 2], [0, self.focal, self.size[1] / 2], [0, 0, 1.0]])

    def in_camera(self) -> np.ndarray:
        """[observation, 3] the observed point in the camera that observed it."""
        w2c = self.w2c[self.view]
        return np.einsum("nij,nj->ni", w2c[:, :3, :3], self.points[self.point]) + w2c[:, :3, 3]

    def errors(self) -> np.ndarray:
        """[observation] reprojection error in pixels; infinite behind the camera."""
        in_camera = self.in_camera()
        depth = in_camera[:, 2]
        ideal = in_camera[:, :2] / np.where(depth > 0, depth, 1.0)[:, None]
        seen = ideal * (1 + self.k1 * (ideal**2).sum(1, keepdims=True)) * self.focal + np.array(self.size) / 2
        return np.where(depth > 0, np.linalg.norm(seen - self.xy, axis=1), np.inf)

    def support(self) -> float:
        """Sum over observations of 1 - (error / 4 px)^2, none below 0 (the score of MSAC, Torr and Zisserman 2000).

        Comparing attempts by mean error alone prefers the one that threw most observations away.
        """
        return float(np.maximum(0.0, 1.0 - (self.errors() / INLIER_PX) ** 2).sum())

    def observed_depths(self) -> list[np.ndarray]:
        """For each view the depths (z > 0) of the points it observes."""
        depth = self.in_camera()[:, 2]
        return [depth[(self.view == v) & (depth > 0)] for v in range(len(self))]

    def parallax_degrees(self) -> np.ndarray:
        """[point] the widest angle between two of its rays (0 for a point seen once)."""
        rays = self.points[self.point] - self.c2w[self.view, :3, 3]
        rays /= np.linalg.norm(rays, axis=1, keepdims=True)
        widest = np.zeros(len(self.points))
        order = np.argsort(self.point, kind="stable")
        starts = np.flatnonzero(np.diff(self.point[order], prepend=-1))
        for group in np.split(order, starts[1:]):
            if len(group):
                chord = np.linalg.norm(rays[group][:, None] - rays[group], axis=-1).max()
                widest[self.point[group[0]]] = np.degrees(2 * np.arcsin(min(1.0, chord / 2)))
        return widest

    def scaled(self, size: tuple[int, int]) -> "SparseModel":
        """The same model in pixels of photos resized to ``size`` (same aspect ratio)."""
        factor = np.array(size) / np.array(self.size)
        return replace(self, size=size, focal=self.focal * float(factor.mean()), xy=self.xy * factor)

    def normalised(self, near: float) -> "SparseModel":
        """The same model in the frame of the mean camera: its centre the origin, x right, y down, z forward, and the
        unit of length such that depth ``near`` becomes 1.

        Structure from motion leaves the frame open. Distances between cameras along the axes (L1, by which sources
        are chosen) are then those along the pictures' axes.
        """
        c2w = self.c2w
        U, _, Vt = np.linalg.svd(c2w[:, :3, :3].sum(0))  # nearest rotation to the mean of all
        mean = U @ np.diag([1.0, 1.0, np.linalg.det(U @ Vt)]) @ Vt
        center = c2w[:, :3, 3].mean(0)
        w2c = self.w2c.copy()
        w2c[:, :3, :3] = self.w2c[:, :3, :3] @ mean
        w2c[:, :3, 3] = (self.w2c[:, :3, 3] + self.w2c[:, :3, :3] @ center) / near
        return replace(self, w2c=w2c, points=(self.points - center) @ mean / near)

    def without_outliers(self, max_error: float) -> "SparseModel":
        """Without observations of more than ``max_error`` pixels, and without points then seen less than twice."""
        kept = self.errors() <= max_error
        kept &= np.bincount(self.point[kept], minlength=len(self.points))[self.point] >= 2
        used = np.zeros(len(self.points), dtype=bool)
        used[self.point[kept]] = True
        renumbered = np.cumsum(used) - 1
        return replace(
            self,
            points=self.points[used],
            colors=self.colors[used],
            view=self.view[kept],
            point=renumbered[self.point[kept]],
            xy=self.xy[kept],
        )
