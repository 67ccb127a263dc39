"""COLMAP reconstructions: ``sparse/0/{cameras,images,points3D}`` in binary or text, with the pictures in
``images``.

The layouts are COLMAP's documented output format. Poses are world-to-camera (quaternion w x y z,
translation), axes and pixel centres (+0.5) are ours already.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from idnerf.data.distortion import Lens
from idnerf.data.photo import (
    PosedPhoto,
    checked_c2w,
    choose_image_folder,
    find_by_stem,
    pinhole_matrix,
    with_pictures,
)
from idnerf.errors import InputError

# id, name, parameters; the order of the parameters is in ``_camera``.
MODELS = {
    0: ("SIMPLE_PINHOLE", 3),
    1: ("PINHOLE", 4),
    2: ("SIMPLE_RADIAL", 4),
    3: ("RADIAL", 5),
    4: ("OPENCV", 8),
    5: ("OPENCV_FISHEYE", 8),
    8: ("SIMPLE_RADIAL_FISHEYE", 4),
    9: ("RADIAL_FISHEYE", 5),
}
PARAMETER_COUNT = dict(MODELS.values())
MODEL_FOLDERS = ("sparse/0", "sparse", "colmap/sparse/0")


@dataclass(frozen=True, eq=False)
class ColmapCamera:
    """Intrinsics of one COLMAP camera: K in pixels of ``size``, and its lens (None for a pinhole)."""

    size: tuple[int, int]
    K: np.ndarray
    lens: Lens | None


@dataclass(frozen=True, eq=False)
class ColmapImage:
    """Pose of one registered picture, and the ids of the 3D points it sees."""

    name: str
    camera_id: int
    w2c: np.ndarray
    point_ids: np.ndarray


def model_folder(root: Path) -> Path | None:
    """The folder that holds a reconstruction, None when there is none."""
    for name in MODEL_FOLDERS:
        if any((root / name / f"{part}.{end}").is_file() for part in ("cameras", "images") for end in ("bin", "txt")):
            return root / name
    return None


def read_colmap(root: Path, size: tuple[int, int] | None = None) -> list[PosedPhoto]:
    """Registered photos of a COLMAP scene, sorted by name, each with the depths of the 3D points it sees.

    Raises:
        InputError: a missing or truncated file, an unknown camera model, a missing picture, a bad pose.
    """
    model = model_folder(root)
    if model is None:
        raise InputError(f"{root} has no COLMAP model; expected sparse/0/cameras.bin or .txt")
    cameras = _read_part(model, "cameras", _cameras_binary, _cameras_text)
    images = sorted(_read_part(model, "images", _images_binary, _images_text), key=lambda image: image.name)
    if not images:
        raise InputError(f"{model} has no registered images; the reconstruction is empty")
    has_points = any((model / f"points3D.{end}").is_file() for end in ("bin", "txt"))
    ids, points = _read_part(model, "points3D", _points_binary, _points_text) if has_points else _no_points()
    if not np.isfinite(points).all():
        raise InputError(f"{model} has 3D points that are not finite (NaN or infinity)")
    order = np.argsort(ids)
    folder = choose_image_folder(root, size, [image.name for image in images])
    found = with_pictures([(image.name, image, find_by_stem(folder / image.name)) for image in images], str(model))
    return [_photo(image, picture, cameras, ids[order], points[order], model) for image, picture in found]


def _no_points() -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(0, dtype=np.int64), np.zeros((0, 3))


def _photo(
    image: ColmapImage,
    picture: Path,
    cameras: dict[int, ColmapCamera],
    ids: np.ndarray,
    points: np.ndarray,
    model: Path,
) -> PosedPhoto:
    if image.camera_id not in cameras:
        raise InputError(f"{model} lists {image.name} with camera {image.camera_id}, which cameras does not hold")
    camera = cameras[image.camera_id]
    rigid = checked_c2w(image.w2c, f"{image.name} in {model}")
    rotation, translation = rigid[:3, :3], rigid[:3, 3]
    c2w = np.eye(4)
    c2w[:3, :3], c2w[:3, 3] = rotation.T, -rotation.T @ translation
    depths = _points_seen(image, ids, points) @ rotation[2] + translation[2]
    return PosedPhoto(
        path=picture,
        c2w=c2w,
        K=camera.K,
        size=camera.size,
        lens=camera.lens,
        observed_depths=depths[depths > 0],
    )


def _points_seen(image: ColmapImage, ids: np.ndarray, points: np.ndarray) -> np.ndarray:
    """World points that the image observes (``ids`` ascending; an unmatched feature has id -1)."""
    if not len(ids):
        return points
    rows = np.searchsorted(ids, image.point_ids).clip(0, len(ids) - 1)
    return points[rows[ids[rows] == image.point_ids]]


def _read_part(model: Path, part: str, read_binary, read_text):
    binary, text = model / f"{part}.bin", model / f"{part}.txt"
    try:
        if binary.is_file():
            return read_binary(binary.read_bytes())
        if text.is_file():
            lines = text.read_text(encoding="utf-8").splitlines()
            return read_text(line for line in lines if not line.startswith("#"))
    except InputError as error:
        raise InputError(f"{model}: {error}") from None
    except (struct.error, ValueError, IndexError, StopIteration, OSError, OverflowError, MemoryError):
        raise InputError(f"{model}/{part} is truncated or no COLMAP {part} file") from None
    raise InputError(f"{model} has no {part}.bin or {part}.txt; expected cameras, images and points3D of COLMAP")


def _camera(model: str, size: tuple[int, int], parameters: tuple[float, ...]) -> ColmapCamera:
    if model not in PARAMETER_COUNT:
        raise InputError(f"camera model {model} is not supported; expected one of {', '.join(PARAMETER_COUNT)}")
    if len(parameters) != PARAMETER_COUNT[model]:
        raise ValueError(f"{model} takes {PARAMETER_COUNT[model]} parameters, {len(parameters)} given")
    if model in ("PINHOLE", "OPENCV", "OPENCV_FISHEYE"):
        fx, fy, cx, cy, *rest = parameters
    else:
        fx, cx, cy, *rest = parameters
        fy = fx
    lens = None
    if model.endswith("FISHEYE"):
        lens = Lens("fisheye", tuple(rest))
    elif rest:
        tangential = (rest[2], rest[3]) if model == "OPENCV" else (0.0, 0.0)
        lens = Lens("perspective", tuple(rest[:2]), tangential)
        lens = None if lens.is_pinhole else lens
    if not (np.isfinite(parameters).all() and min(fx, fy) > 0 and min(size) > 0):
        raise InputError(f"a {model} camera has size {size} and parameters {parameters}; expected finite, positive")
    return ColmapCamera(size, pinhole_matrix(fx, fy, cx, cy), lens)


def _w2c(quaternion: np.ndarray, translation: np.ndarray) -> np.ndarray:
    """4x4 from a quaternion (w, x, y, z), normalised here; NaN goes through, to be reported with the name."""
    w, x, y, z = quaternion / max(float(np.linalg.norm(quaternion)), 1e-12)
    matrix = np.eye(4)
    matrix[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    matrix[:3, 3] = translation
    return matrix


def _cameras_binary(data: bytes) -> dict[int, ColmapCamera]:
    (count,) = struct.unpack_from("<Q", data)
    offset, cameras = 8, {}
    for _ in range(count):
        camera_id, model_id, width, height = struct.unpack_from("<iiQQ", data, offset)
        if model_id not in MODELS:
            raise InputError(f"camera model number {model_id} is not supported; expected {', '.join(PARAMETER_COUNT)}")
        model, parameter_count = MODELS[model_id]
        parameters = struct.unpack_from(f"<{parameter_count}d", data, offset + 24)
        offset += 24 + 8 * parameter_count
        cameras[camera_id] = _camera(model, (width, height), parameters)
    return cameras


def _cameras_text(lines: Iterator[str]) -> dict[int, ColmapCamera]:
    cameras = {}
    for line in lines:
        if line.strip():
            camera_id, model, width, height, *parameters = line.split()
            size = (int(width), int(height))
            cameras[int(camera_id)] = _camera(model, size, tuple(float(p) for p in parameters))
    return cameras


def _images_binary(data: bytes) -> list[ColmapImage]:
    point2d = np.dtype([("xy", "<f8", 2), ("id", "<i8")])
    (count,) = struct.unpack_from("<Q", data)
    offset, images = 8, []
    for _ in range(count):
        _, *pose, camera_id = struct.unpack_from("<i7di", data, offset)
        offset += 64
        end = data.index(b"\0", offset)
        name = data[offset:end].decode("utf-8")
        (point_count,) = struct.unpack_from("<Q", data, end + 1)
        observed = np.frombuffer(data, point2d, point_count, end + 9)
        offset = end + 9 + point_count * point2d.itemsize
        images.append(ColmapImage(name, camera_id, _w2c(np.array(pose[:4]), np.array(pose[4:])), observed["id"]))
    return images


def _images_text(lines: Iterator[str]) -> list[ColmapImage]:
    images = []
    for line in lines:
        if not line.strip():
            continue
        _, *pose, camera_id, name = line.strip().split(maxsplit=9)
        values = np.array(pose, dtype=np.float64)
        # The second line of an image lists its points as x y id; it is empty when there are none.
        point_ids = np.array(next(lines, "").split()[2::3], dtype=np.float64).astype(np.int64)
        images.append(ColmapImage(name, int(camera_id), _w2c(values[:4], values[4:]), point_ids))
    return images


def _points_binary(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    (count,) = struct.unpack_from("<Q", data)
    record, offset = struct.Struct("<Q3d3BdQ"), 8
    if offset + count * record.size > len(data):
        raise ValueError("truncated")
    ids, points = np.zeros(count, dtype=np.int64), np.zeros((count, 3))
    for row in range(count):
        ids[row], *points[row], _, _, _, _, track_length = record.unpack_from(data, offset)
        offset += record.size + 8 * track_length
    if offset > len(data):
        raise ValueError("truncated")
    return ids, points


def _points_text(lines: Iterator[str]) -> tuple[np.ndarray, np.ndarray]:
    rows = [line.split(maxsplit=4)[:4] for line in lines if line.strip()]
    if not rows:
        return _no_points()
    return np.array([int(row[0]) for row in rows]), np.array([row[1:4] for row in rows], dtype=np.float64)
