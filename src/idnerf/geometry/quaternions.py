"""Rotations as unit quaternions (w, x, y, z), as COLMAP's files and viser have them; in float64."""

import numpy as np
from jaxtyping import Float

Quaternion = Float[np.ndarray, "4"]


def rotation_of(wxyz: Quaternion) -> Float[np.ndarray, "3 3"]:
    """Rotation matrix of a quaternion (normalised here)."""
    w, x, y, z = wxyz / np.linalg.norm(wxyz)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def quaternion_of(rotation: Float[np.ndarray, "3 3"]) -> Quaternion:
    """Unit quaternion (w >= 0) of a rotation matrix: the eigenvector of Bar-Itzhack's 4x4 matrix (2000).

    It is exact for rotations and the nearest one for matrices that rounding has bent.
    """
    (a, b, c), (d, e, f), (g, h, i) = rotation
    matrix = np.array(
        [
            [a + e + i, h - f, c - g, d - b],
            [h - f, a - e - i, b + d, c + g],
            [c - g, b + d, e - a - i, f + h],
            [d - b, c + g, f + h, i - a - e],
        ]
    )
    wxyz = np.linalg.eigh(matrix)[1][:, -1]
    return wxyz if wxyz[0] >= 0 else -wxyz
