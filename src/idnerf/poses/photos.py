"""The photos to pose: which files, what size, what focal length to start from; upright copies for the features."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import ExifTags, Image

from idnerf.data.image_io import IMAGE_SUFFIXES, image_size, list_images, read_image, write_png
from idnerf.errors import InputError

USUAL_FOCAL = 0.85
"""Focal length over longer side where EXIF says nothing: between main phone lenses (24 to 28 mm on film: 0.69 to 0.81)
and 35 mm (0.97). COLMAP starts from 1.2 (43 mm), which three photos do not always recover from."""

FILM_DIAGONAL_MM = math.hypot(36, 24)

SAME_ASPECT = 1.01
"""Photos whose aspect ratios differ by less are resampled to one size."""


@dataclass(frozen=True)
class PhotoSet:
    """Photos of one shape.

    Attributes:
        paths: the files, sorted by name.
        size: (width, height) upright; that of the smallest photo where they differ in resolution.
        focal: focal length to start from, in pixels of ``size``.
        focal_source: "given", "EXIF" or "guessed".
    """

    paths: tuple[Path, ...]
    size: tuple[int, int]
    focal: float
    focal_source: str

    @property
    def focal_known(self) -> bool:
        return self.focal_source != "guessed"


def photo_files(path: Path) -> list[Path]:
    """The pictures in a folder, or in its ``images`` folder; empty when there are none."""
    return list_images(path) or list_images(path / "images")


def find_photos(path: Path, focal: float | None = None) -> PhotoSet:
    """The photos of a folder, checked by their headers.

    Args:
        path: folder of pictures, or with a folder ``images``.
        focal: known focal length, in pixels of the photos.

    Raises:
        InputError: no folder, fewer than two pictures, an unreadable one, or pictures of different shapes.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist; expected a folder of photos")
    if not path.is_dir():
        raise InputError(f"{path} is a file; expected a folder of photos (at least 2, better 3 or more)")
    files = photo_files(path)
    if not files and any(p.suffix.lower() in (".heic", ".heif") for p in path.iterdir()):
        raise InputError(f"{path} holds HEIC photos, which are not read; export them as JPEG")
    if not files:
        raise InputError(f"{path} holds no photos; expected files ending in {', '.join(IMAGE_SUFFIXES)}")
    if len(files) == 1:
        raise InputError(
            f"{path} holds one photo ({files[0].name}): depth needs parallax; step sideways and take 2 or more others"
        )
    sizes = [image_size(file) for file in files]
    usual = max(sizes, key=lambda size: sum(same_shape(size, other) for other in sizes))
    odd = [number for number, size in enumerate(sizes) if not same_shape(size, usual)]
    if odd:
        raise InputError(
            f"photos of different shapes in {path}: most are {usual[0]}x{usual[1]}, {files[odd[0]].name} is "
            f"{sizes[odd[0]][0]}x{sizes[odd[0]][1]}; leave out the odd ones or crop all to one shape"
        )
    smallest = min(sizes, key=lambda size: size[0] * size[1])
    if focal is not None:
        return PhotoSet(tuple(files), smallest, focal, "given")
    from_exif = [exif_focal(file, smallest) for file in files]
    known = [f for f in from_exif if f is not None]
    # One lens for all: EXIF counts when every photo has it and they agree (a zoom may have moved).
    if len(known) == len(files) and max(known) < 1.05 * min(known):
        return PhotoSet(tuple(files), smallest, sum(known) / len(known), "EXIF")
    return PhotoSet(tuple(files), smallest, USUAL_FOCAL * max(smallest), "guessed")


def same_shape(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether the aspect ratios agree (within 1 %)."""
    ratio = size[0] * other[1] / (size[1] * other[0])
    return max(ratio, 1 / ratio) <= SAME_ASPECT


def exif(path: Path) -> Image.Exif | None:
    """EXIF of the formats that cameras write; None for the others, where looking would decode the whole file."""
    with Image.open(path) as picture:
        if picture.format not in ("JPEG", "MPO", "TIFF", "WEBP"):
            return None
        tags = picture.getexif()
        tags.get_ifd(ExifTags.IFD.Exif)  # read while the file is open
        return tags


def exif_focal(path: Path, size: tuple[int, int]) -> float | None:
    """Focal length in pixels of ``size`` from the 35 mm equivalent in EXIF (by the diagonal); None without one."""
    tags = exif(path)
    value = tags.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.FocalLengthIn35mmFilm) if tags else None
    try:
        equivalent = float(value) if value is not None else 0.0
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return equivalent / FILM_DIAGONAL_MM * math.hypot(*size) if 8 <= equivalent <= 1000 else None


def is_upright(path: Path) -> bool:
    """Whether the stored pixels are as shown, without an EXIF orientation to apply."""
    tags = exif(path)
    return tags is None or tags.get(ExifTags.Base.Orientation, 1) in (0, 1)


def feature_size(size: tuple[int, int], longer_side: int) -> tuple[int, int]:
    """The photos' size, shrunk to at most ``longer_side``."""
    share = min(1.0, longer_side / max(size))
    return max(1, round(size[0] * share)), max(1, round(size[1] * share))


def write_feature_images(photos: PhotoSet, size: tuple[int, int], folder: Path, done: Callable[[], None]) -> list[str]:
    """Upright copies at ``size`` as ``00000.png``, ...; returns their names.

    Raises:
        InputError: a photo that cannot be decoded; the message names it.
    """
    names = []
    for number, path in enumerate(photos.paths):
        names.append(f"{number:05d}.png")
        write_png(folder / names[-1], read_image(path, size))
        done()
    return names
