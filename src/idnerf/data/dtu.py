"""DTU in the training layout published with MVSNet: ``Cameras/train``, ``Rectified/{scan}_train``,
``Depths/{scan}``."""

import re
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from idnerf.data.image_io import image_size
from idnerf.data.photo import PosedPhoto, checked_c2w
from idnerf.errors import InputError

SCALE = 1 / 200
"""Published: millimetres / 200, for translations and depths alike."""

DEPTH_PLANES = 192
"""far = depth_min + 192 x interval."""

IMAGE_SIZE = (640, 512)
WHOLE_SIZE, CROP = (800, 600), (80, 44)
"""The training layout's pictures are windows of the photos at half their size: the size, and the window's corner."""

CAMERA_SCALE = 4
"""K in the camera files is for a quarter of ``IMAGE_SIZE``."""

_PICTURE = re.compile(r"rect_(\d+)_(\d)_r5000\.png$")


def scans(root: Path) -> list[str]:
    """Scans of a DTU root in natural order (scan9 before scan10)."""
    found = {p.name.removesuffix("_train") for p in (root / "Rectified").glob("scan*") if p.is_dir()}
    return sorted(found, key=lambda name: ([int(n) for n in re.findall(r"\d+", name)] or [0], name))


def choose_scan(root: Path, scan: str | None) -> str:
    """The scan asked for ("scan24" or "24"), or the only one there.

    Raises:
        InputError: no such scan, or several and none named.
    """
    found = scans(root)
    if not found:
        raise InputError(f"{root} has no scans; expected Rectified/scanN_train folders")
    if scan is None:
        if len(found) > 1:
            raise InputError(f"{root} holds {len(found)} scans ({found[0]} .. {found[-1]}); name one with --scan")
        return found[0]
    name = scan if scan.startswith("scan") else f"scan{scan}"
    if name not in found:
        raise InputError(
            f"{root} has no {name}; its scans are {', '.join(found[:8])}{' ...' if len(found) > 8 else ''}"
        )
    return name


def read_dtu(root: Path, scan: str, light: int) -> tuple[list[int], list[PosedPhoto]]:
    """Camera ids (ascending, may have gaps) and photos of one scan under one of the lights 0 to 6.

    Raises:
        InputError: no pictures of that light, a picture without its camera file, a bad camera file.
    """
    pictures = [(camera, path) for (camera, of), path in scan_pictures(root, scan).items() if of == light]
    if not pictures:
        folder = scan_folder(root, scan)
        raise InputError(f"{folder} has no pictures of light {light}; expected rect_001_{light}_r5000.png and so on")
    return [camera for camera, _ in pictures], [_photo(root, scan, camera, path) for camera, path in pictures]


def scan_folder(root: Path, scan: str) -> Path:
    """Where a scan's pictures are: ``Rectified/{scan}_train``, or ``Rectified/{scan}`` where that is not there."""
    folder = root / "Rectified" / f"{scan}_train"
    return folder if folder.is_dir() else root / "Rectified" / scan


def scan_pictures(root: Path, scan: str) -> dict[tuple[int, int], Path]:
    """A scan's pictures by (camera id, light), ascending."""
    found = ((_PICTURE.match(path.name), path) for path in scan_folder(root, scan).iterdir())
    return dict(sorted(((int(m[1]) - 1, int(m[2])), path) for m, path in found if m))


def _photo(root: Path, scan: str, camera: int, picture: Path) -> PosedPhoto:
    path = root / "Cameras" / "train" / f"{camera:08d}_cam.txt"
    c2w, K, near, far = read_camera_file(path)
    whole = _is_whole(picture)
    if whole:
        K[:2, 2] += CROP
    depth_path = root / "Depths" / scan / f"depth_map_{camera:04d}.pfm"
    return PosedPhoto(
        path=picture,
        c2w=c2w,
        K=K,
        size=WHOLE_SIZE if whole else IMAGE_SIZE,
        near=near,
        far=far,
        depth=partial(read_depth_map, depth_path, whole) if depth_path.is_file() else None,
    )


def _is_whole(picture: Path) -> bool:
    """Whether a picture is a whole photo (1600x1200) rather than the training layout's window of it.

    Raises:
        InputError: it is neither.
    """
    width, height = image_size(picture, orient=False)
    if width * WHOLE_SIZE[1] == height * WHOLE_SIZE[0]:
        return True
    if width * IMAGE_SIZE[1] != height * IMAGE_SIZE[0]:
        raise InputError(
            f"image {picture} is {width}x{height}; expected 640x512 (the training layout) or 1600x1200 (whole photos)"
        )
    return False


def read_camera_file(path: Path) -> tuple[np.ndarray, np.ndarray, float, float]:
    """c2w (scene units), K (pixels of 640x512), near and far (scene units) of a camera file.

    Raises:
        InputError: missing, malformed or not finite.
    """
    try:
        words = path.read_text(encoding="utf-8").split()
        extrinsic, intrinsic = words.index("extrinsic") + 1, words.index("intrinsic") + 1
        w2c = np.array(words[extrinsic : extrinsic + 16], dtype=np.float64).reshape(4, 4)
        K = np.array(words[intrinsic : intrinsic + 9], dtype=np.float64).reshape(3, 3)
        depth_min, interval = (float(word) for word in words[intrinsic + 9 : intrinsic + 11])
    except OSError:
        raise InputError(f"camera file {path} is missing or unreadable") from None
    except ValueError:
        raise InputError(
            f"camera file {path} is malformed; expected 'extrinsic' and 4x4 numbers, 'intrinsic' and 3x3, "
            "depth_min and interval"
        ) from None
    w2c[:3, 3] *= SCALE
    rigid = checked_c2w(w2c, path.name)
    c2w = np.eye(4)
    c2w[:3, :3] = rigid[:3, :3].T
    c2w[:3, 3] = -rigid[:3, :3].T @ rigid[:3, 3]
    K[:2] *= CAMERA_SCALE
    near, far = depth_min * SCALE, (depth_min + DEPTH_PLANES * interval) * SCALE
    if not (np.isfinite(K).all() and K[0, 0] > 0 and K[1, 1] > 0 and 0 < near < far < np.inf):
        raise InputError(f"camera file {path} has a bad intrinsic matrix or depth range ({depth_min}, {interval})")
    return c2w, K, near, far


def read_depth_map(path: Path, whole: bool = False) -> Float[Tensor, "height width"]:
    """Depth (z, scene units, 0 unknown) on the 640x512 picture: every second pixel of the 1600x1200 map,
    cropped. With ``whole`` on the 800x600 picture: not cropped, and a map of 640x512 is unknown around.

    Raises:
        InputError: unreadable, truncated, or of another size.
    """
    depth = read_pfm(path)
    window = slice(CROP[1], CROP[1] + IMAGE_SIZE[1]), slice(CROP[0], CROP[0] + IMAGE_SIZE[0])
    if depth.shape == (1200, 1600):
        depth = depth[::2, ::2] if whole else depth[::2, ::2][window]
    elif depth.shape != (512, 640):
        raise InputError(f"depth map {path} is {depth.shape[1]}x{depth.shape[0]}; expected 1600x1200 or 640x512")
    elif whole:
        inner, depth = depth, np.zeros((WHOLE_SIZE[1], WHOLE_SIZE[0]))
        depth[window] = inner
    return torch.from_numpy(np.ascontiguousarray(depth, dtype=np.float32)) * SCALE


def read_pfm(path: Path) -> np.ndarray:
    """A one-channel PFM, first row on top (the file stores the last row first).

    Raises:
        InputError: unreadable or truncated.
    """
    try:
        with path.open("rb") as file:
            if file.readline().strip() != b"Pf":
                raise ValueError("not a one-channel PFM")
            width, height = (int(n) for n in file.readline().split())
            order = "<" if float(file.readline()) < 0 else ">"
            values = np.frombuffer(file.read(width * height * 4), dtype=f"{order}f4")
            return values.reshape(height, width)[::-1]
    except OSError:
        raise InputError(f"depth map {path} is missing or unreadable") from None
    except ValueError:
        raise InputError(f"depth map {path} is truncated or no one-channel PFM") from None
