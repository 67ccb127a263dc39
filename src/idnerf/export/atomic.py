"""Whole files and folders or none: written beside their place, then renamed."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from idnerf.errors import InputError
from idnerf.files import place_to_write


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path that becomes ``path`` (what it leads to, if it is a link) when the block ends well.

    Raises:
        InputError: the place cannot be written, or is no regular file.
    """
    place = place_to_write(path)
    temporary = place.with_name(f".{place.stem}.{os.getpid()}{path.suffix}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, place)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; choose another --out") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``path`` (absent or empty) when the block ends well.

    Raises:
        InputError: the folder holds something already, or the place cannot be written.
    """
    check_new_folder(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if path.exists():
            path.rmdir()
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; choose another --out") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_new_folder(path: Path) -> None:
    """Raises InputError when ``path`` is a file, a folder with something in it, or no name (such as ``.``)."""
    if not path.name or path.name == "..":
        raise InputError(f"expected the name of a new folder for --out, got {str(path)!r}")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path}: expected a new or empty folder, found files in it; choose another --out")
