"""What several commands read the same way: sizes, lists of views, devices."""

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from idnerf.data.scene import Scene
from idnerf.data.view_selection import usual_sources
from idnerf.errors import InputError

Item = TypeVar("Item")

DEFAULT_LONGER_SIDE = 960
"""Photos larger than this are worked on at this size unless --size says otherwise."""

LARGEST_SIDE = 8192
"""Of --size, in pixels: more is a slip of the finger."""


def parse_size(text: str | None) -> tuple[int, int] | None:
    """``480x320`` to (480, 320)."""
    if text is None:
        return None
    parts = text.lower().split("x")
    good = len(parts) == 2 and all(p.isascii() and p.isdigit() and 16 <= int(p) <= LARGEST_SIDE for p in parts)
    if not good:
        raise InputError(
            f"expected --size as WIDTHxHEIGHT of 16 to {LARGEST_SIDE} pixels each, such as 480x320; got {text!r}"
        )
    return int(parts[0]), int(parts[1])


def parse_views(text: str | None, flag: str) -> tuple[int, ...] | None:
    """``0,3,7`` to (0, 3, 7)."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.replace(" ", "").split(",") if part)
    except ValueError:
        raise InputError(f"expected {flag} as view numbers such as 0,3,7; got {text!r}") from None


def choose_device(name: str) -> torch.device:
    """``auto`` takes the GPU where there is one."""
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"expected --device auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch finds no CUDA device here; use --device cpu or auto")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def working_size(scene: Scene) -> tuple[int, int]:
    """The photos' size, shrunk to a longer side of at most ``DEFAULT_LONGER_SIDE``."""
    width, height = scene.cameras.size
    share = min(1.0, DEFAULT_LONGER_SIDE / max(width, height))
    return max(16, round(width * share)), max(16, round(height * share))


def posed(scene: Path, *, quiet: bool = False) -> Path:
    """The scene's folder; photos without poses are posed first, and the folder kept for them is returned."""
    from idnerf.poses.kept import needs_poses, posed_scene

    scene = scene.expanduser()
    if not needs_poses(scene):
        return scene
    with progress_bar("finding poses", quiet=quiet) as update:
        folder, report = posed_scene(scene, update=update)
    if quiet:
        return folder
    lines = [f"poses found before are kept in {folder}"] if report is None else [f"{folder}:", *report.lines()]
    print("\n".join(lines))
    return folder


def check_quality(quality: str) -> None:
    if quality not in ("full", "fast"):
        raise InputError(f"expected --quality full or fast, got {quality!r}")


def choose_precision(name: str, device: torch.device) -> Literal["float32", "bf16"]:
    """``auto`` takes bfloat16 where the hardware is fast at it."""
    from idnerf.geometry.precision import has_fast_bfloat16

    if name == "float32" or name == "bf16":
        return name
    if name != "auto":
        raise InputError(f"expected --precision auto, float32 or bf16, got {name!r}")
    return "bf16" if has_fast_bfloat16(device) else "float32"


def load_model(weights: str, device: torch.device, precision: str = "auto") -> Any:
    """An ``IDNeRF`` in evaluation mode."""
    from idnerf.models.idnerf import IDNeRF

    model = IDNeRF.from_pretrained(weights).to(device)
    model.precision = choose_precision(precision, device)
    return model


@contextlib.contextmanager
def progress_bar(title: str, *, quiet: bool = False) -> Iterator[Any]:
    """Yields update(done, total); silent when standard error is no terminal, or when ``quiet``."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=quiet or not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def counted(items: Iterable[Item], total: int, update: Callable[[int, int], Any]) -> Iterator[Item]:
    """The items, each told to ``progress_bar``'s update once it has been used."""
    for number, item in enumerate(items):
        yield item
        update(number + 1, total)


def check_writable(path: Path, *, folder: bool = False) -> None:
    """Fail before the work, not after it: whether ``path`` can become a file, or a folder to write into.

    Raises:
        InputError: it is the other of the two, lies below a file, or its place does not let us write.
    """
    try:
        parent = _nearest_folder(path, folder)
    except OSError as error:  # a folder that we may not look into, a name too long
        raise InputError(f"cannot write {path}: {error.strerror or error}; choose another place") from None
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"cannot write {path}: {parent} takes no files ({reason}); choose another place") from None


def _nearest_folder(path: Path, folder: bool) -> Path:
    """The folder on the way to ``path`` that is there already, ``path`` itself included."""
    if folder and path.exists() and not path.is_dir():
        raise InputError(f"cannot write into {path}: it is a file, not a folder; choose another place")
    if not folder and path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder; give the name of a file in it")
    parent = path if path.is_dir() else path.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise InputError(f"cannot write {path}: {parent} is a file, not a folder; choose another place")
    return parent


def check_num_sources(count: int | None) -> None:
    if count is not None and count < 2:
        raise InputError(f"expected --num-sources of at least 2, got {count}")


def checked_num_sources(count: int | None, available: int, most: int | None = None) -> int:
    """``--num-sources`` as given, at most ``most`` or all there are; where it is not, the usual number of these."""
    if available < 2:
        raise InputError(f"expected at least 2 source views, the scene has {available}: give more photos")
    most = available if most is None else min(most, available)
    if count is None:
        return usual_sources(most)
    check_num_sources(count)
    if count > most:
        raise InputError(f"expected --num-sources from 2 to the {most} source views there are, got {count}")
    return count


def check_frames(count: int) -> None:
    if count < 1:
        raise InputError(f"expected --frames of at least 1, got {count}")
