"""The photos of a scene as small camera frusta in one browser's 3D view."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from idnerf.types import Cameras
from idnerf.viewer.view_point import pose_of
from idnerf.viewer.world_frame import FOCUS_DISTANCE, WorldFrame

MOST_SHOWN = 120
"""More frusta than this hide one another."""

IN_USE, IDLE = (255, 150, 30), (130, 140, 155)


class PhotoFrusta:
    """Frusta with their photos; the sources in use are orange. A click goes to the view.

    Args:
        scene_api: a client's 3D scene (viser's ``SceneApi``).
        frame: from the scene's world to the browser's.
        cameras: [view] the scene's cameras.
        shown: which views have a frustum.
        go_to: called with a view's index.
    """

    def __init__(
        self, scene_api: Any, frame: WorldFrame, cameras: Cameras, shown: Sequence[int], go_to: Callable[[int], None]
    ):
        self._used: tuple[int, ...] = ()
        self._positions = np.zeros((len(shown), 3))
        self._handles: dict[int, Any] = {}
        self.scale = frustum_scale(cameras, frame)
        for row, i in enumerate(shown):
            wxyz, position = frame.to_viewer(pose_of(cameras[i]))
            self._positions[row] = position
            self._handles[i] = scene_api.add_camera_frustum(
                f"/photos/{i}",
                fov=2 * float(np.arctan(cameras.height / 2 / float(cameras.K[i, 1, 1]))),
                aspect=cameras.width / cameras.height,
                scale=self.scale,
                thickness=0.03 * self.scale,
                color=IDLE,
                wxyz=wxyz,
                position=position,
                cast_shadow=False,
                receive_shadow=False,
            )
            self._handles[i].on_click(lambda _, i=i: go_to(i))

    def set_photo(self, index: int, photo: UInt8[np.ndarray, "height width 3"]) -> None:
        """Put the photo of a view on its frustum."""
        if index in self._handles:
            self._handles[index].image = photo

    def mark(self, sources: tuple[int, ...]) -> None:
        """Colour the sources in use."""
        for i in set(self._used) ^ set(sources):
            if i in self._handles:
                self._handles[i].color = IN_USE if i in sources else IDLE
        self._used = sources

    def look_from(self, position: Float[np.ndarray, "3"], shown: bool) -> None:
        """Hide frusta around the eye: one stands right before it and covers the picture."""
        near = np.linalg.norm(self._positions - position, axis=-1) < 2.5 * self.scale
        for handle, hidden in zip(self._handles.values(), near, strict=True):
            visible = shown and not bool(hidden)
            if handle.visible != visible:
                handle.visible = visible


def frustum_scale(cameras: Cameras, frame: WorldFrame) -> float:
    """A third of the median distance between nearest cameras, within bounds that stay visible and modest."""
    centers = cameras.centers.double().cpu().numpy() * frame.scale
    distances = np.linalg.norm(centers[:, None] - centers[None], axis=-1) + np.diag(np.full(len(centers), np.inf))
    return float(np.clip(np.median(distances.min(1)) / 3, 0.01 * FOCUS_DISTANCE, 0.1 * FOCUS_DISTANCE))
