"""NeRF-Synthetic (Blender) scenes: ``transforms_train.json``, RGBA renderings composed on white. Other programs write
files of that name with the keys of ``transforms.json``, and those are read as such."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from idnerf.data.photo import PosedPhoto
from idnerf.data.transforms import DISTORTION, frames_of, photos_of, read_json

BLENDER_FILE = "transforms_train.json"

# The published range of every NeRF-Synthetic scene (PROTOCOL.md), and the distance of its cameras from the origin.
NEAR, FAR = 2.0, 6.0
CAMERA_DISTANCE = 4.03

INTRINSICS = ("fl_x", "fl_y", "cx", "cy", "camera_angle_y", "camera_model", "is_fisheye")
NEVER_SYNTHETIC = (*INTRINSICS, *DISTORTION, "distortion_params")
"""Keys that NeRF-Synthetic does not have: its files give ``camera_angle_x`` and poses."""


def read_blender(path: Path) -> list[PosedPhoto]:
    """Photos of a ``transforms_train.json``, in the order of the file (the index that protocols use).

    Intrinsics and depth range are what the file says, at the top or per frame, as in ``transforms.json``. A scene of
    NeRF-Synthetic says ``camera_angle_x`` alone: the focal length follows from it and the width of the pictures,
    whatever their size, and near and far are 2 and 6.

    Raises:
        InputError: unreadable JSON, no frames, a missing picture, a bad pose, no focal length.
    """
    content = read_json(path)
    frames = frames_of(content, path)
    given = [key for key in ("near", "far") if content.get(key) is not None]
    if len(given) == 1:  # the other is the published one
        content = {"near": NEAR, "far": FAR} | {key: value for key, value in content.items() if value is not None}
    photos = photos_of(content, frames, path)
    if not _is_synthetic(content, frames, photos):
        return photos
    return [replace(photo, near=NEAR, far=FAR) if photo.near is None else photo for photo in photos]


def _is_synthetic(content: dict[str, Any], frames: Sequence[dict[str, Any]], photos: Sequence[PosedPhoto]) -> bool:
    """Whether nothing but ``camera_angle_x`` is given and all cameras are as far from the origin as the published."""
    if any(values.get(key) is not None for values in (content, *frames) for key in NEVER_SYNTHETIC):
        return False
    distances = np.linalg.norm([photo.c2w[:3, 3] for photo in photos], axis=-1)
    return bool((abs(distances - CAMERA_DISTANCE) < 0.15 * CAMERA_DISTANCE).all())
