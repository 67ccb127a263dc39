"""Frames to files: MP4 (H.264), GIF, or a folder of PNGs. One frame in memory at a time, whole files or none."""

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Set
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from idnerf.data.image_io import write_png
from idnerf.data.notes import say_note
from idnerf.errors import InputError
from idnerf.files import place_to_write

VIDEO_SUFFIXES = (".mp4", ".gif")
SLOWEST_FPS, FASTEST_FPS = 0.01, 1000.0
FASTEST_GIF_FPS = 50.0
"""A GIF's delays are hundredths of a second, and browsers slow down what is shorter than two of them."""
NUMBERED = re.compile(r"(.+)_(\d{4,})\.(png|npy)")
"""Names of the files of a frame."""


def write_video(path: Path, frames: Iterable[Float[Tensor, "3 height width"]], fps: float) -> int:
    """Write frames (RGB in [0, 1], one size) to .mp4 or .gif; returns their number.

    H.264 wants even sizes: a last odd row or column is left out of an MP4.

    Raises:
        InputError: another suffix, frames per second that it cannot have, or a place that cannot be written.
    """
    if path.suffix not in VIDEO_SUFFIXES:
        raise InputError(f"expected --out ending in .mp4 or .gif for a video, got {path.name!r}")
    check_fps(fps, path.suffix)
    place = place_to_write(path)
    temporary = place.with_name(f".{place.stem}.{os.getpid()}{path.suffix}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write = _write_mp4 if path.suffix == ".mp4" else _write_gif
        count = write(temporary, frames, fps)
        os.replace(temporary, place)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; choose another --out") from error
    finally:
        temporary.unlink(missing_ok=True)
    return count


def check_fps(fps: float, suffix: str) -> None:
    """Raises InputError for frames per second that a file with this ending cannot have."""
    fastest = FASTEST_GIF_FPS if suffix == ".gif" else FASTEST_FPS
    if not SLOWEST_FPS <= fps <= fastest:
        of_what = " of a GIF, whose delays are hundredths of a second," if suffix == ".gif" else ""
        raise InputError(f"expected --fps{of_what} from {SLOWEST_FPS:g} to {fastest:g}, got {fps:g}")


def write_frames(folder: Path, frames: Iterable[dict[str, Float[Tensor, "channel height width"]]]) -> int:
    """Write each frame's pictures as ``{name}_{number:04d}.png`` and tensors of one channel as .npy instead.

    An existing folder is replaced only file by file; a new one appears when it is complete. Frames of a longer run that
    are there are named in a note.

    Raises:
        InputError: the folder cannot be written.
    """
    fresh = not folder.exists()
    place = folder.with_name(f".{folder.name}.{os.getpid()}") if fresh else folder
    try:
        place.mkdir(parents=True, exist_ok=True)
        count = 0
        names: set[str] = set()
        for number, pictures in enumerate(frames):
            names |= set(pictures)
            for name, picture in pictures.items():
                if picture.shape[0] == 3:
                    write_png(place / f"{name}_{number:04d}.png", picture)
                else:
                    np.save(place / f"{name}_{number:04d}.npy", picture[0].cpu().numpy())
            count = number + 1
        _note_later_frames(place, names, count)
        if fresh:
            os.replace(place, folder)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error}; choose another --out") from error
    finally:
        if fresh:
            shutil.rmtree(place, ignore_errors=True)
    return count


def _note_later_frames(folder: Path, names: Set[str], count: int) -> None:
    """Frames of an earlier, longer run are not taken away, as nobody asked for that; but they are named."""
    found = [NUMBERED.fullmatch(path.name) for path in folder.iterdir()]
    later = sorted(m[0] for m in found if m is not None and m[1] in names and int(m[2]) >= count)
    if later:
        say_note(f"{folder} holds frames of an earlier run beyond the {count} of this one, from {later[0]} on")


def to_bytes(frame: Float[Tensor, "3 height width"]) -> np.ndarray:
    """RGB in [0, 1] to 8 bits, height width 3."""
    return (frame.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().contiguous().numpy()


def _write_mp4(path: Path, frames: Iterable[Tensor], fps: float) -> int:
    from fractions import Fraction

    import av

    count = 0
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "16", "preset": "medium"}
        for frame in frames:
            pixels = to_bytes(frame)
            height, width = pixels.shape[0] // 2 * 2, pixels.shape[1] // 2 * 2
            if count == 0:
                stream.width, stream.height = width, height
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels[:height, :width]), format="rgb24")
            for packet in stream.encode(picture):
                container.mux(packet)
            count += 1
        for packet in stream.encode():
            container.mux(packet)
    return count


def _write_gif(path: Path, frames: Iterable[Tensor], fps: float) -> int:
    pictures = _gif_pictures(frames, fps)
    first = next(iter(pictures), None)
    if first is None:
        raise InputError("a video needs at least one frame: raise --frames")
    count = 1

    def rest() -> Iterable[Image.Image]:
        nonlocal count
        for picture in pictures:
            count += 1
            yield picture

    first.save(path, format="GIF", save_all=True, append_images=rest(), loop=0)
    return count


def _gif_pictures(frames: Iterable[Tensor], fps: float) -> Iterator[Image.Image]:
    """Pictures that carry their delays: whole hundredths of a second, rounded so that the sum of them stays right."""
    for number, frame in enumerate(frames):
        picture = Image.fromarray(to_bytes(frame)).quantize(dither=Image.Dither.FLOYDSTEINBERG)
        picture.info["duration"] = 10 * (round(100 * (number + 1) / fps) - round(100 * number / fps))
        yield picture
