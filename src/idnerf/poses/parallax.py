"""Telling photos taken from one place (the camera only turned) from photos with parallax."""

import numpy as np

FOCAL_RATIOS = np.geomspace(0.55, 2.0, 12)
"""Focal lengths over the longer side that are tried when asking whether turning alone explains two photos."""

EXPLAINED = 0.9
"""Share of the matches that turning must explain."""


def turning_residual(xy1: np.ndarray, xy2: np.ndarray, size: tuple[int, int]) -> float:
    """How badly a turning camera explains matches, in pixels: the 90 % quantile of the distances, at the best focal
    length.

    Matches of a camera that only turned (any rotation, any depth) obey x2 ~ K R K^-1 x1. R is fitted to the bearing
    vectors (Kabsch 1976), twice more on the 80 % it fits best, so that wrong matches do not decide.

    Args:
        xy1, xy2: [match, 2] pixels in the two photos.
        size: (width, height) of both.
    """
    center = np.array(size) / 2
    best = np.inf
    for ratio in FOCAL_RATIOS:
        focal = ratio * max(size)
        rays1, rays2 = ((np.c_[(xy - center) / focal, np.ones(len(xy))]) for xy in (xy1, xy2))
        unit1, unit2 = (rays / np.linalg.norm(rays, axis=1, keepdims=True) for rays in (rays1, rays2))
        kept = np.arange(len(xy1))
        for _ in range(3):
            U, _, Vt = np.linalg.svd(unit2[kept].T @ unit1[kept])
            rotation = U @ np.diag([1.0, 1.0, np.linalg.det(U @ Vt)]) @ Vt
            turned = rays1 @ rotation.T
            distance = np.where(
                turned[:, 2] > 0.05,
                np.linalg.norm(turned[:, :2] / np.maximum(turned[:, 2:], 0.05) * focal + center - xy2, axis=1),
                np.inf,
            )
            kept = np.argsort(distance)[: max(3, int(0.8 * len(distance)))]
        best = min(best, float(np.quantile(distance, EXPLAINED, method="lower")))
    return best
