"""LLFF scenes: ``poses_bounds.npy`` beside ``images`` (or ``images_2``, ``images_4``, ``images_8``).

One row per picture in sorted file-name order: a 3x5 matrix [R | t | hwf], whose axes are down, right, back,
then the nearest and farthest depth of the scene in that view. hwf is for the full-size photos.
"""

from pathlib import Path

import numpy as np

from idnerf.data.image_io import list_images
from idnerf.data.photo import PosedPhoto, checked_c2w, choose_image_folder, pinhole_matrix
from idnerf.errors import InputError

POSES_FILE = "poses_bounds.npy"

# PROTOCOL.md: near and far are 0.8 x the smallest and 1.2 x the largest bound of the sources. Put on every
# camera here, the smallest near and largest far of any set of sources are just that.
NEAR_SLACK, FAR_SLACK = 0.8, 1.2


def read_llff(root: Path, size: tuple[int, int] | None = None) -> list[PosedPhoto]:
    """Photos of an LLFF scene, from the smallest image folder that serves ``size`` (width, height).

    Raises:
        InputError: an unreadable pose file, a pose count unlike the image count, NaN poses, bad bounds.
    """
    path = root / POSES_FILE
    try:
        rows = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        raise InputError(f"{path} is unreadable or truncated; expected an N x 17 array of poses and bounds") from None
    if rows.ndim != 2 or rows.shape[1] != 17 or not len(rows):
        raise InputError(f"{path} has shape {'x'.join(map(str, rows.shape))}; expected N x 17 (3x5 pose, near, far)")
    rows = rows.astype(np.float64)
    folder = choose_image_folder(root, size)
    images = list_images(folder)
    if len(images) != len(rows):
        raise InputError(f"{path} has {len(rows)} poses but {folder} has {len(images)} images; expected one each")
    return [_photo(image, row) for image, row in zip(images, rows, strict=True)]


def _photo(image: Path, row: np.ndarray) -> PosedPhoto:
    pose, (near, far) = row[:15].reshape(3, 5), row[15:]
    down, right, back, center, (height, width, focal) = pose.T
    c2w = checked_c2w(np.stack([right, down, -back, center], 1), f"{image.name} in {POSES_FILE}")
    if not (np.isfinite([height, width, focal]).all() and min(height, width, focal) > 0):
        raise InputError(f"height, width, focal of {image.name} in {POSES_FILE} are {height}, {width}, {focal}")
    if not (np.isfinite([near, far]).all() and 0 < near < far):
        raise InputError(f"bounds of {image.name} in {POSES_FILE} are {near:g}, {far:g}; expected 0 < near < far")
    return PosedPhoto(
        path=image,
        c2w=c2w,
        K=pinhole_matrix(focal, focal, width / 2, height / 2),
        size=(round(width), round(height)),
        near=NEAR_SLACK * float(near),
        far=FAR_SLACK * float(far),
    )
