"""Where a file goes that is written beside its place and then renamed."""

import os
from pathlib import Path

from idnerf.errors import InputError


def place_to_write(path: Path) -> Path:
    """The regular file that ``path`` leads to, there or not yet: renaming onto it leaves a symbolic link a link.

    Raises:
        InputError: something else is there, such as a device or a pipe, which a renamed file would take the place of.
    """
    place = Path(os.path.realpath(path)) if os.path.islink(path) else path
    found = None
    if os.path.isdir(path):
        found = "a folder"
    elif os.path.exists(path) and not os.path.isfile(path):
        found = "a device, pipe or socket"
    elif os.path.islink(place):
        found = "a symbolic link that leads round in a circle"
    if found:
        raise InputError(f"cannot write {path}: expected a regular file or nothing there, found {found}")
    return place
