"""``transforms.json``: nerfstudio, instant-ngp, and our own procedural scenes.

Poses are camera-to-world in OpenGL axes (right, up, back). Intrinsics stand at the top or in each frame (the
frame wins); near and far likewise, optional. Our procedural scenes say ``"idnerf_procedural": true`` and give
each frame near, far and ``depth_file_path``, a float32 .npy of exact depth (z, 0 unknown).
"""

import json
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from idnerf.data.distortion import Lens
from idnerf.data.image_io import IMAGE_SUFFIXES, image_size
from idnerf.data.photo import PosedPhoto, checked_c2w, pinhole_matrix, with_pictures
from idnerf.errors import InputError

TRANSFORMS_FILE = "transforms.json"
PINHOLE_MODELS = ("PINHOLE", "SIMPLE_PINHOLE")
PERSPECTIVE_MODELS = ("OPENCV", "RADIAL", "SIMPLE_RADIAL")
FISHEYE_MODELS = ("OPENCV_FISHEYE",)
DISTORTION = ("k1", "k2", "k3", "k4", "p1", "p2")
"""Coefficients of a lens, in the order of nerfstudio's ``distortion_params``."""

OPENGL_TO_OPENCV = np.array([1.0, -1.0, -1.0])


def read_transforms(path: Path) -> tuple[str, list[PosedPhoto]]:
    """Format ("transforms" or "procedural") and photos of a ``transforms.json``, in the order of the file.

    Raises:
        InputError: unreadable JSON, no frames, a listed picture that is missing, a bad pose, an unknown
            camera model.
    """
    content = read_json(path)
    photos = photos_of(content, frames_of(content, path), path)
    return ("procedural" if content.get("idnerf_procedural") else "transforms"), photos


def photos_of(content: dict[str, Any], frames: Sequence[dict[str, Any]], path: Path) -> list[PosedPhoto]:
    """The photos of a file's frames; what the file says at its top holds for frames that do not say it."""
    listed = [(str(frame["file_path"]), frame, find_picture(path, frame)) for frame in frames]
    return [posed_photo(path, {**content, **frame}, picture) for frame, picture in with_pictures(listed, str(path))]


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable JSON: {error}") from None
    except RecursionError:
        raise InputError(f"{path} is not readable JSON: nested too deeply") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}; expected an object with 'frames'")
    return content


def frames_of(content: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    frames = content.get("frames")
    if not isinstance(frames, list) or not frames:
        raise InputError(f"{path} has no 'frames': expected a list of pictures with their poses")
    for number, frame in enumerate(frames):
        for key in ("file_path", "transform_matrix"):
            if not isinstance(frame, dict) or key not in frame:
                raise InputError(f"frame {number} of {path} lacks '{key}'")
    return frames


def find_picture(path: Path, frame: dict[str, Any]) -> Path | None:
    """The frame's picture, None where it is not there. A missing file extension is added, and backslashes may stand
    between folders, as Windows writes them."""
    name = str(frame["file_path"])
    for listed in dict.fromkeys((path.parent / name, path.parent / name.replace("\\", "/"))):
        for suffix in ("", *IMAGE_SUFFIXES, *(s.upper() for s in IMAGE_SUFFIXES)):
            candidate = listed.with_name(listed.name + suffix) if suffix else listed
            if candidate.is_file():
                return candidate
    return None


def opencv_pose(path: Path, frame: dict[str, Any]) -> np.ndarray:
    """4x4 OpenCV camera-to-world of a frame (the file's axes are OpenGL's)."""
    what = f"{frame['file_path']} in {path.name}"
    try:
        matrix = np.array(frame["transform_matrix"], dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"the transform_matrix of {what} is not a matrix of numbers") from None
    if matrix.shape not in ((3, 4), (4, 4)):
        raise InputError(f"the transform_matrix of {what} has shape {matrix.shape}; expected 4x4")
    matrix = matrix[:3].copy()
    matrix[:, :3] *= OPENGL_TO_OPENCV
    return checked_c2w(matrix, what)


def number(values: dict[str, Any], key: str, path: Path) -> float | None:
    """A finite number under ``key``, None when absent or null."""
    value = values.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise InputError(f"'{key}' in {path} is {value!r}; expected a number")
    return float(value)


def view_angle(values: dict[str, Any], key: str, path: Path) -> float | None:
    """A camera's opening angle under ``key``, radians; None when absent or null."""
    angle = number(values, key, path)
    if angle is not None and not 0 < angle < math.pi:
        raise InputError(f"'{key}' in {path} is {angle:g}; expected radians between 0 and pi")
    return angle


def posed_photo(path: Path, values: dict[str, Any], picture: Path) -> PosedPhoto:
    """The photo of a frame. ``values`` are the frame's, and those at the top of the file where it has none."""

    def get(key: str) -> float | None:
        return number(values, key, path)

    width, height = get("w"), get("h")
    if width is None or height is None:
        width, height = (float(pixels) for pixels in image_size(picture, orient=False))
    if min(width, height) < 1:
        raise InputError(f"'w', 'h' in {path} are {width:g}, {height:g}; expected pixels, at least 1")
    fx, fy = _focal_lengths(path, values, width, height)
    cx, cy = get("cx"), get("cy")
    K = pinhole_matrix(fx, fy, width / 2 if cx is None else cx, height / 2 if cy is None else cy)
    near, far = get("near"), get("far")
    if (near is None) != (far is None) or (near is not None and far is not None and not 0 < near < far):
        raise InputError(
            f"near, far of {picture.name} in {path} are {near}, {far}; expected 0 < near < far, or neither"
        )
    depth_file = values.get("depth_file_path") if values.get("idnerf_procedural") else None
    if depth_file is not None and not isinstance(depth_file, str):
        raise InputError(f"'depth_file_path' in {path} is {depth_file!r}; expected the name of an .npy file")
    return PosedPhoto(
        path=picture,
        c2w=opencv_pose(path, values),
        K=K,
        size=(round(width), round(height)),
        lens=_lens(path, values),
        near=near,
        far=far,
        depth=None if depth_file is None else partial(read_depth_npy, path.parent / depth_file),
    )


def _focal_lengths(path: Path, values: dict[str, Any], width: float, height: float) -> tuple[float, float]:
    fx, fy = number(values, "fl_x", path), number(values, "fl_y", path)
    if fx is None:
        angle_x, angle_y = (view_angle(values, key, path) for key in ("camera_angle_x", "camera_angle_y"))
        if fy is None and angle_y is not None:
            fy = height / 2 / math.tan(angle_y / 2)
        if angle_x is not None:
            fx = width / 2 / math.tan(angle_x / 2)
        elif angle_y is not None:
            fx = fy
    if fx is None:
        raise InputError(f"{path} gives no focal length; expected 'fl_x' or 'camera_angle_x', at the top or per frame")
    fy = fx if fy is None else fy
    if min(fx, fy) <= 0:
        raise InputError(f"focal lengths in {path} are {fx:g}, {fy:g}; expected positive pixels")
    return fx, fy


def _lens(path: Path, values: dict[str, Any]) -> Lens | None:
    model = str(values.get("camera_model") or "OPENCV").upper()
    *radial, p1, p2 = _distortion(path, values)
    if model in FISHEYE_MODELS or values.get("is_fisheye"):
        return Lens("fisheye", tuple(radial))
    if model in PINHOLE_MODELS:
        return None
    if model not in PERSPECTIVE_MODELS:
        known = ", ".join(PINHOLE_MODELS + PERSPECTIVE_MODELS + FISHEYE_MODELS)
        raise InputError(f"camera_model {model} in {path} is not supported; expected one of {known}")
    lens = Lens("perspective", tuple(radial), (p1, p2))
    return None if lens.is_pinhole else lens


def _distortion(path: Path, values: dict[str, Any]) -> list[float]:
    """k1, k2, k3, k4, p1, p2: from nerfstudio's ``distortion_params`` where they are given, else one by one."""
    together = values.get("distortion_params")
    if together is None:
        return [number(values, key, path) or 0.0 for key in DISTORTION]
    if not isinstance(together, list) or len(together) != len(DISTORTION):
        raise InputError(f"'distortion_params' in {path} is {together!r}; expected 6 numbers: {', '.join(DISTORTION)}")
    given: dict[str, Any] = dict(zip(DISTORTION, together, strict=True))
    return [number(given, key, path) or 0.0 for key in DISTORTION]


def read_depth_npy(path: Path) -> Float[Tensor, "height width"]:
    """Exact depth of a procedural scene: float32 z in scene units, 0 unknown."""
    try:
        depth = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        raise InputError(f"depth map {path} is missing, unreadable or truncated") from None
    if depth.ndim != 2 or not np.isfinite(depth).all():
        raise InputError(f"depth map {path} has shape {depth.shape}; expected height x width finite numbers, 0 unknown")
    return torch.from_numpy(depth.astype(np.float32))
