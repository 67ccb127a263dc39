"""Reading, resizing and writing pictures. The one resampling filter is Pillow's Lanczos
(``RESIZE_FILTER``)."""

import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from idnerf.errors import InputError
from idnerf.files import place_to_write

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")

RESIZE_FILTER = "lanczos"
"""Named in reports: the published protocols resize with Pillow's antialiased Lanczos, and so does
``resize``."""

# Pillow reports a damaged file by any of these, depending on the format and on where the file ends.
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, Image.DecompressionBombError)

ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
INVERSE = {
    Image.Transpose.ROTATE_90: Image.Transpose.ROTATE_270,
    Image.Transpose.ROTATE_270: Image.Transpose.ROTATE_90,
}
"""The other orientations undo themselves."""


def _open(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except FileNotFoundError:
        raise InputError(f"image {path} does not exist") from None
    except UnidentifiedImageError:
        raise InputError(f"image {path} is unreadable: not a picture, or cut off in its header") from None
    except DAMAGED as error:
        raise InputError(f"image {path} is unreadable: {_one_line(error)}") from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _exif_transpose(picture: Image.Image) -> Image.Transpose | None:
    # Pillow decodes a whole PNG to look for an EXIF chunk after the pixels; one before them is in ``info``.
    if picture.format == "PNG" and "exif" not in picture.info:
        return None
    return ORIENTATIONS.get(picture.getexif().get(ExifTags.Base.Orientation, 1))


def _turn(picture: Image.Image, orient: bool) -> Image.Transpose | None:
    """What makes the picture as Pillow decodes it the one as shown, or (without ``orient``) as stored."""
    transpose = _exif_transpose(picture)
    # Pillow turns a TIFF by itself, and gives the size of the turned picture.
    if transpose is None or picture.format != "TIFF":
        return transpose if orient else None
    return None if orient else INVERSE.get(transpose, transpose)


def image_size(path: str | Path, orient: bool = True) -> tuple[int, int]:
    """(width, height) from the header alone; as shown (EXIF orientation applied) or as stored.

    Raises:
        InputError: missing or unreadable file.
    """
    with _open(Path(path)) as picture:
        width, height = picture.size
        turn = _turn(picture, orient)
    swaps = turn is not None and turn >= Image.Transpose.ROTATE_90 and turn != Image.Transpose.ROTATE_180
    return (height, width) if swaps else (width, height)


def read_image(
    path: str | Path, size: tuple[int, int] | None = None, *, orient: bool = True, quick: bool = False
) -> Float[Tensor, "3 height width"]:
    """Decode a picture to RGB in [0, 1].

    Transparent pictures are composed on white; grey, palette, 16-bit and float pictures become RGB.

    Args:
        size: (width, height) to resize to with ``RESIZE_FILTER``; None keeps the file's size.
        orient: apply the EXIF orientation.
        quick: for thumbnails: let JPEG decode at a reduced scale (not smaller than ``size``).

    Raises:
        InputError: missing, unreadable or truncated file; the message names it.
    """
    path = Path(path)
    with _open(path) as picture:
        try:
            turn = _turn(picture, orient)
            if quick and size is not None and turn is None:
                picture.draft("RGB", size)
            picture.load()
            rgb = _to_rgb(picture, path)
        except DAMAGED as error:
            raise InputError(f"image {path} is damaged or truncated: {_one_line(error)}") from None
    if turn is not None:
        rgb = rgb.transpose(turn)
    if size is not None and rgb.size != size:
        rgb = rgb.resize(size, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous().float() / 255


def _to_rgb(picture: Image.Image, path: Path) -> Image.Image:
    if picture.mode == "F":
        return _float_to_rgb(np.asarray(picture, dtype=np.float64), path)
    if picture.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips at 255
        grey = np.asarray(picture, dtype=np.float64) / 257
        return Image.fromarray(grey.clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return picture.convert("RGB")


def _float_to_rgb(grey: np.ndarray, path: Path) -> Image.Image:
    """Grey in [0, 1]; a trifle outside, as left by resizing, is clamped."""
    low, high = float(grey.min()), float(grey.max())
    if not -0.1 <= low <= high <= 1.1:
        raise InputError(
            f"image {path} holds floating-point values from {low:g} to {high:g}; expected 0 to 1: save it with 8 or "
            "16 bits"
        )
    return Image.fromarray((grey.clip(0, 1) * 255).round().astype(np.uint8)).convert("RGB")


def resize(
    image: Float[Tensor, "channel height width"], size: tuple[int, int]
) -> Float[Tensor, "channel new_height new_width"]:
    """Resize to (width, height) with ``RESIZE_FILTER``: antialiased, in float, clamped to [0, 1]."""
    if (image.shape[2], image.shape[1]) == size:
        return image
    channels = [
        np.asarray(Image.fromarray(channel).resize(size, Image.Resampling.LANCZOS))
        for channel in image.detach().cpu().float().numpy()
    ]
    return torch.from_numpy(np.stack(channels)).clamp(0, 1).to(image.device)


def write_png(path: str | Path, image: Float[Tensor, "3 height width"] | Float[Tensor, "height width"]) -> None:
    """Write RGB or grey in [0, 1] as an 8-bit PNG, atomically: a reader sees the old file or the whole new
    one.

    Raises:
        InputError: the folder cannot be written, or what is there is no regular file.
    """
    path = Path(path)
    place = place_to_write(path)
    values = (image.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8)
    picture = Image.fromarray(values.numpy() if values.ndim == 2 else values.permute(1, 2, 0).contiguous().numpy())
    temporary = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=place.parent, suffix=".tmp", delete=False) as file:
            temporary = file.name
            picture.save(file, format="PNG")
        os.chmod(temporary, 0o644)
        os.replace(temporary, place)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; choose a folder you can write to") from None
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def list_images(folder: Path) -> list[Path]:
    """Picture files of a folder, sorted by name (the order published for LLFF)."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
