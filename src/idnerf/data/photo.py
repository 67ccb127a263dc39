"""A photo on disk with its camera: what every format's reader returns, before anything is decoded."""

import glob
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from idnerf.data.distortion import Lens, pinhole_intrinsics, undistort
from idnerf.data.image_io import IMAGE_SUFFIXES, image_size, list_images, read_image, resize
from idnerf.errors import InputError

Entry = TypeVar("Entry")


@dataclass(frozen=True, eq=False)
class PosedPhoto:
    """One photo and the camera that took it.

    Attributes:
        path: the picture file.
        c2w: 4x4 camera-to-world, OpenCV axes, float64.
        K: 3x3 intrinsics in pixels of ``size``, of the photo as taken (lens still in), float64.
        size: (width, height) that ``K`` is for; after ``matched_to_file`` the size of the picture itself.
        lens: distortion, None for a pinhole.
        near, far: depth range in scene units, None when the format gives none.
        depth: reads the exact depth map (z, scene units, 0 unknown), None when the format has none.
        observed_depths: depths (z) of the 3D points the format says this photo sees, to infer the range from.
        orient: whether the EXIF orientation is to be applied.
    """

    path: Path
    c2w: np.ndarray
    K: np.ndarray
    size: tuple[int, int]
    lens: Lens | None = None
    near: float | None = None
    far: float | None = None
    depth: Callable[[], Float[Tensor, "height width"]] | None = None
    observed_depths: np.ndarray | None = None
    orient: bool = True

    @property
    def pinhole_K(self) -> Float[Tensor, "3 3"]:
        """Intrinsics after undistortion, in pixels of ``size``, float64."""
        K = torch.from_numpy(self.K)
        return K if self.lens is None else pinhole_intrinsics(self.lens, K, self.size)

    def read(self, pinhole_K: Float[Tensor, "3 3"], size: tuple[int, int]) -> Float[Tensor, "3 height width"]:
        """The undistorted photo at ``size``. ``pinhole_K`` is the undistorted camera, in pixels of
        ``size``."""
        if self.lens is None:
            return read_image(self.path, size, orient=self.orient)
        image = read_image(self.path, orient=self.orient)  # straightened at full resolution, where it costs least
        file_pinhole_K = scale_intrinsics(pinhole_K.double(), size, self.size)
        return resize(undistort(image, self.lens, torch.from_numpy(self.K), file_pinhole_K), size)

    def read_thumbnail(self, pinhole_K: Float[Tensor, "3 3"], size: tuple[int, int]) -> Float[Tensor, "3 height width"]:
        """Like ``read`` but several times faster, for measuring at small sizes: decoded and resized first."""
        image = read_image(self.path, size, orient=self.orient, quick=True)
        if self.lens is None:
            return image
        K = scale_intrinsics(torch.from_numpy(self.K), self.size, size)
        return undistort(image, self.lens, K, pinhole_K.double())


def scale_intrinsics(K: Float[Tensor, "3 3"], size: tuple[int, int], new_size: tuple[int, int]) -> Float[Tensor, "3 3"]:
    """Intrinsics after a resize; fx and fy scale apart (pixel centres at +0.5: no offset)."""
    return K * K.new_tensor([[new_size[0] / size[0]], [new_size[1] / size[1]], [1.0]])


def pinhole_matrix(fx: float, fy: float, cx: float, cy: float) -> np.ndarray:
    """3x3 K."""
    return np.array([[fx, 0.0, cx], [0.0, fy, cy], [0.0, 0.0, 1.0]])


def checked_c2w(matrix: np.ndarray, what: str) -> np.ndarray:
    """A 4x4 rigid camera-to-world whose rotation is exact, from one that was rounded in a text file.

    Rotations written with few digits (or scaled uniformly, as exported Blender objects are) are replaced by
    the nearest rotation, so that the inverse is the transpose.

    Args:
        matrix: 3x4 or 4x4, OpenCV axes.
        what: names the view in the error.

    Raises:
        InputError: NaN, a mirror, or no rotation at all.
    """
    if not np.isfinite(matrix).all():
        raise InputError(f"the pose of {what} is not finite (NaN or infinity); remove that view or fix its pose")
    U, singular, Vt = np.linalg.svd(matrix[:3, :3])
    if singular[-1] <= 0 or singular[0] > 1.02 * singular[-1]:
        raise InputError(
            f"the pose of {what} holds no rotation (singular values {singular.round(3).tolist()}); expected "
            "an orthogonal 3x3 part"
        )
    rotation = U @ Vt
    if np.linalg.det(rotation) < 0:
        raise InputError(f"the pose of {what} is a mirror (determinant -1); its axes are not what the format says")
    c2w = np.eye(4)
    c2w[:3, :3] = rotation
    c2w[:3, 3] = matrix[:3, 3]
    return c2w


def matched_to_file(photos: Sequence[PosedPhoto]) -> list[PosedPhoto]:
    """Bring every K to the size of its picture, read from the picture headers.

    A calibration is taken to be for the stored pixels, as structure-from-motion programs ignore the EXIF
    orientation; that is applied only where the calibration's width and height fit the turned picture better.

    Raises:
        InputError: an unreadable header, a camera of no pixels, pictures of two sizes, or portrait pictures under a
            landscape calibration.
    """
    matched = []
    for photo in photos:
        if min(photo.size) < 1:
            raise InputError(
                f"the camera of {photo.path} was calibrated for {photo.size[0]}x{photo.size[1]} pixels; expected at "
                "least 1x1"
            )
        shown, stored = image_size(photo.path), image_size(photo.path, orient=False)
        orient = _aspect_error(shown, photo.size) < _aspect_error(stored, photo.size)
        size = shown if orient else stored
        if _aspect_error(size, photo.size) > 1.2 and (size[0] > size[1]) != (photo.size[0] > photo.size[1]):
            raise InputError(
                f"image {photo.path} is {size[0]}x{size[1]} but its camera was calibrated for "
                f"{photo.size[0]}x{photo.size[1]}: one is upright, the other lies on its side"
            )
        K = scale_intrinsics(torch.from_numpy(photo.K), photo.size, size).numpy()
        matched.append(replace(photo, K=K, size=size, orient=orient))
    first = matched[0]
    for photo in matched:
        if photo.size != first.size:
            raise InputError(
                f"images of two sizes: {first.path.name} is {first.size[0]}x{first.size[1]}, "
                f"{photo.path.name} is {photo.size[0]}x{photo.size[1]}; expected one size per scene: "
                "resize or remove the odd ones"
            )
    return matched


def _aspect_error(size: tuple[int, int], other: tuple[int, int]) -> float:
    ratio = size[0] / size[1] / (other[0] / other[1])
    return max(ratio, 1 / ratio)


def choose_image_folder(root: Path, size: tuple[int, int] | None, names: Sequence[str] = ()) -> Path:
    """The folder of pictures that serves ``size`` best: the smallest of images, images_2, images_4, images_8
    that is at least that large; without a size, or when none is, the largest.

    Args:
        names: the pictures wanted, below the folder. A folder counts when it holds one of them; without names, when
            it holds any picture.

    Raises:
        InputError: no such folder holds a picture.
    """
    folders = [root / name for name in ("images", "images_2", "images_4", "images_8")]
    samples = ((folder, _sample_picture(folder, names)) for folder in folders)
    found = [(folder, picture) for folder, picture in samples if picture is not None]
    if not found:
        such = f" such as {names[0]}" if names else ""
        places = ", ".join(f"{folder.name}/" for folder in folders)
        raise InputError(f"{root} has poses but no pictures{such}: expected them in {places}")
    best = found[0][0]
    if size is not None:
        for folder, image in found:
            width, height = image_size(image)
            if width >= size[0] and height >= size[1]:
                best = folder  # the folders come from large to small
    return best


def _sample_picture(folder: Path, names: Sequence[str]) -> Path | None:
    if not names:
        return next(iter(list_images(folder)), None)
    return next((path for name in names if (path := find_by_stem(folder / name)) is not None), None)


def find_by_stem(path: Path) -> Path | None:
    """The picture, or (in a folder of smaller copies) one of its name with another extension; None without either."""
    if path.is_file():
        return path
    beside = sorted(path.parent.glob(f"{glob.escape(path.stem)}.*")) if path.parent.is_dir() else []
    return next((other for other in beside if other.suffix.lower() in IMAGE_SUFFIXES), None)


def with_pictures(listed: Sequence[tuple[str, Entry, Path | None]], source: str) -> list[tuple[Entry, Path]]:
    """The entries of a scene's description with their pictures. None may be missing: views are numbered as listed.

    Args:
        listed: name, entry and picture file (None where there is none) of each picture that ``source`` lists.
        source: names the description in the error.

    Raises:
        InputError: a picture is missing.
    """
    missing = [name for name, _, picture in listed if picture is None]
    if missing:
        others = f" ({len(missing)} of its {len(listed)} pictures are missing)" if len(missing) > 1 else ""
        raise InputError(
            f"{source} lists {missing[0]}, but it does not exist{others}; put it there or delete the entry"
        )
    return [(entry, picture) for _, entry, picture in listed if picture is not None]
