"""Telling photos taken from one place (the camera only turned) from photos with parallax."""

import numpy as np

FOCAL_RATIOS = np.geomspace(0.55, 2.0, 14)
DISTORTIONS = np.linspace(-0.15, 0.15, 11)
"""Focal lengths over the longer side, and lens distortions k1, that are tried when asking whether turning alone
explains two photos. A distorted lens that turns passes for parallax otherwise, and gives poses that fit to 0.1 px and
are wrong."""

EXPLAINED = 0.9
"""Share of the matches that turning must explain."""

MAX_MATCHES = 300


def turning_residual(xy1: np.ndarray, xy2: np.ndarray, size: tuple[int, int]) -> float:
    """How badly a turning camera explains matches, in pixels: the 90 % quantile of the distances, at the best focal
    length and distortion.

    Matches of a camera that only turned (any rotation, any depth) obey x2 ~ K R K^-1 x1 once the lens is undone. R is
    fitted to the bearing vectors (Kabsch 1976), twice more on the 80 % it fits best, so that wrong matches do not
    decide.

    Args:
        xy1, xy2: [match, 2] pixels in the two photos.
        size: (width, height) of both.
    """
    chosen = np.linspace(0, len(xy1) - 1, min(len(xy1), MAX_MATCHES)).astype(int)
    focal, k1 = (grid.reshape(-1, 1, 1) for grid in np.meshgrid(FOCAL_RATIOS * max(size), DISTORTIONS))
    rays1, rays2 = (straight_rays((xy[chosen] - np.array(size) / 2) / focal, k1) for xy in (xy1, xy2))
    unit1, unit2 = (rays / np.linalg.norm(rays, axis=2, keepdims=True) for rays in (rays1, rays2))
    distance = np.zeros(rays1.shape[:2])
    for _ in range(3):
        kept = np.argsort(distance, axis=1)[:, : max(3, int(0.8 * len(chosen)))]
        first, second = (np.take_along_axis(unit, kept[..., None], 1) for unit in (unit1, unit2))
        U, _, Vt = np.linalg.svd(second.transpose(0, 2, 1) @ first)
        U[:, :, 2] *= np.linalg.det(U @ Vt)[:, None]
        turned = rays1 @ (U @ Vt).transpose(0, 2, 1)
        depth = np.maximum(turned[..., 2:], 0.05)
        distance = np.linalg.norm(turned[..., :2] / depth - rays2[..., :2], axis=2) * focal[..., 0]
        distance = np.where(turned[..., 2] > 0.05, distance, np.inf)
    return float(np.quantile(distance, EXPLAINED, axis=1, method="lower").min())


def straight_rays(bent: np.ndarray, k1: np.ndarray) -> np.ndarray:
    """[..., 3] rays (x, y, 1) of points bent by  1 + k1 r^2, undone to second order in k1 (ample for a test)."""
    r2 = (bent**2).sum(-1, keepdims=True)
    ideal = bent * (1 - k1 * r2 + 3 * (k1 * r2) ** 2)
    return np.concatenate([ideal, np.ones_like(r2)], -1)
