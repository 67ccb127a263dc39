"""The browser's world: the scene turned upright, centred on what the cameras look at, and brought to one scale.

Orbit controls turn about the vertical and about one point, and move by steps of the distance to it. Scenes come with
any up direction, origin and unit; a similarity brings them all to z up, the focus at the origin, three units away:

    x_viewer = scale * rotation (x_scene - origin)

viser's cameras have OpenCV axes as ours; a rotation travels as a unit quaternion (w, x, y, z).
"""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from idnerf.geometry.quaternions import Quaternion, quaternion_of, rotation_of
from idnerf.geometry.trajectories import focus_point, mean_direction
from idnerf.types import Cameras

FOCUS_DISTANCE = 3.0
"""Median distance of the cameras from the focus, viewer units."""

Vector = Float[np.ndarray, "3"]
Pose = Float[np.ndarray, "4 4"]


@dataclass(frozen=True)
class WorldFrame:
    """The similarity between the scene's world and the browser's (module docstring)."""

    rotation: Float[np.ndarray, "3 3"]
    origin: Vector
    scale: float

    def to_viewer(self, c2w: Pose) -> tuple[Quaternion, Vector]:
        """Orientation and position in the browser's world."""
        position = self.scale * self.rotation @ (c2w[:3, 3] - self.origin)
        return quaternion_of(self.rotation @ c2w[:3, :3]), position

    def to_scene(self, wxyz: Quaternion, position: Vector) -> Pose:
        """Camera-to-world in the scene's world."""
        c2w = np.eye(4)
        c2w[:3, :3] = self.rotation.T @ rotation_of(wxyz)
        c2w[:3, 3] = self.rotation.T @ position / self.scale + self.origin
        return c2w

    def orbit(self, c2w: Pose) -> tuple[Vector, Vector, Vector]:
        """(position, look_at, up) in the browser's world, as orbit controls want a pose.

        The point looked at is on the optical axis, where it passes the focus. ``up`` is the scene's vertical as far as
        the pose allows: what it loses is the camera's roll, so the pose is kept and turning stays upright.
        """
        turned = self.rotation @ c2w[:3, :3]
        right, down, forward = turned.T
        position = self.scale * self.rotation @ (c2w[:3, 3] - self.origin)
        ahead = max(float(-position @ forward), 0.3 * FOCUS_DISTANCE)
        vertical = np.array([0.0, 0.0, 1.0])
        up = vertical - (vertical @ right) * right
        if -down @ up < 0.05:  # looking straight up or down, or upside down
            up = -down
        return position, position + ahead * forward, up / np.linalg.norm(up)


def fit_world_frame(cameras: Cameras) -> WorldFrame:
    """The frame of a scene's [view] cameras: up is their mean up, the focus where they look."""
    cameras = cameras.to("cpu")
    cameras = replace(cameras, c2w=cameras.c2w.double(), K=cameras.K.double())
    up = mean_direction(-cameras.c2w[:, :3, 1]).numpy()
    ahead = mean_direction(cameras.c2w[:, :3, 2]).numpy()
    focus, c2w = focus_point(cameras).numpy(), cameras.c2w.numpy()
    sideways = np.cross(ahead, up)
    if np.linalg.norm(sideways) < 1e-3:  # cameras that look straight down on average
        sideways = c2w[0, :3, 0] - (c2w[0, :3, 0] @ up) * up
    sideways = sideways / np.linalg.norm(sideways)
    rotation = np.stack([sideways, np.cross(up, sideways), up])
    distance = float(np.median(np.linalg.norm(c2w[:, :3, 3] - focus, axis=-1)))
    return WorldFrame(rotation, focus, FOCUS_DISTANCE / max(distance, 1e-9))
