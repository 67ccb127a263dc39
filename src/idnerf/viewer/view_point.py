"""Where the browser looks from, as the camera the model renders.

A browser's camera has square pixels and its principal point in the middle; it is known by its pose, its vertical
field of view and the window's aspect (width over height).
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from idnerf.types import Cameras


@dataclass(frozen=True, eq=False)
class ViewPoint:
    """One browser camera in the scene's own world.

    Attributes:
        c2w: camera-to-world, OpenCV axes, scene units.
        fov: vertical field of view, radians.
        aspect: width over height of the window.
    """

    c2w: Float[np.ndarray, "4 4"]
    fov: float
    aspect: float

    def size(self, longer_side: int) -> tuple[int, int]:
        """(width, height) of this aspect, even numbers of at least 16 pixels."""
        share = longer_side / max(self.aspect, 1.0)
        return even(share * self.aspect), even(share)

    def camera(self, size: tuple[int, int], near: float, far: float) -> Cameras:
        """The camera (no batch axis) that fills ``size`` (width, height): f = h / (2 tan(fov / 2)), centred.

        ``size`` is the aspect rounded to whole pixels: fx takes up the rest, so that every size shows the same field.
        """
        width, height = size
        fy = height / 2 / math.tan(self.fov / 2)
        fx = fy * width / (height * self.aspect)
        K = torch.tensor([[fx, 0.0, width / 2], [0.0, fy, height / 2], [0.0, 0.0, 1.0]])
        c2w = torch.from_numpy(self.c2w).float()
        return Cameras(c2w, K, size, torch.tensor(float(near)), torch.tensor(float(far)))


def even(length: float) -> int:
    """The nearest even number, at least 16."""
    return max(16, 2 * round(length / 2))


def pose_of(camera: Cameras) -> Float[np.ndarray, "4 4"]:
    """A camera's c2w (no batch axis) in double precision."""
    return camera.c2w.double().cpu().numpy()


def field_inside_photo(camera: Cameras, aspect: float) -> float:
    """The largest vertical field of view (radians) of a window of ``aspect`` that stays inside the photo.

    A window wider than the photo would otherwise begin with edges that no source sees.
    """
    K = camera.K.double().cpu()
    half_height = min(float(K[1, 2]), camera.height - float(K[1, 2])) / float(K[1, 1])
    half_width = min(float(K[0, 2]), camera.width - float(K[0, 2])) / float(K[0, 0])
    return 2 * math.atan(min(half_height, half_width / aspect))
