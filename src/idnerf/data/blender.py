"""NeRF-Synthetic (Blender) scenes: ``transforms_train.json``, RGBA renderings composed on white."""

import math
from pathlib import Path

from idnerf.data.image_io import image_size
from idnerf.data.photo import PosedPhoto, pinhole_matrix
from idnerf.data.transforms import find_picture, frames_of, number, opencv_pose, read_json, view_angle
from idnerf.errors import InputError

BLENDER_FILE = "transforms_train.json"

# The published range of every NeRF-Synthetic scene (PROTOCOL.md).
NEAR, FAR = 2.0, 6.0


def read_blender(path: Path) -> list[PosedPhoto]:
    """Photos of a ``transforms_train.json``, in the order of the file (the index that protocols use).

    The focal length comes from ``camera_angle_x`` and the width of the pictures, whatever their size;
    ``near`` and ``far`` are 2 and 6 unless the file says otherwise.

    Raises:
        InputError: unreadable JSON, no frames, a missing picture, a bad pose, no ``camera_angle_x``.
    """
    content = read_json(path)
    angle = view_angle(content, "camera_angle_x", path)
    if angle is None:
        raise InputError(f"{path} gives no 'camera_angle_x'; expected radians between 0 and pi")
    near, far = number(content, "near", path), number(content, "far", path)
    near, far = NEAR if near is None else near, FAR if far is None else far
    if not 0 < near < far:
        raise InputError(f"near, far in {path} are {near}, {far}; expected 0 < near < far")
    photos = []
    for frame in frames_of(content, path):
        picture = find_picture(path, frame)
        width, height = image_size(picture)
        focal = width / 2 / math.tan(angle / 2)
        K = pinhole_matrix(focal, focal, width / 2, height / 2)
        photos.append(PosedPhoto(picture, opencv_pose(path, frame), K, (width, height), near=near, far=far))
    return photos
