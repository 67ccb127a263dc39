"""Posed scenes kept beside their photos, so that a second command on the same folder is quick."""

import hashlib
import json
import os
import shutil
from pathlib import Path

from idnerf.data.load import recognise
from idnerf.errors import InputError
from idnerf.poses.config import PosesConfig
from idnerf.poses.estimate import PosesReport, Update, estimate_poses
from idnerf.poses.photos import photo_files

KEPT_FOLDER = ".idnerf"
FINGERPRINT_FILE = "photos.sha256"


def needs_poses(path: Path) -> bool:
    """Whether a folder holds pictures but no poses in any format that is read."""
    return path.is_dir() and recognise(path) is None and bool(photo_files(path))


def posed_scene(
    photos: Path,
    config: PosesConfig | None = None,
    update: Update | None = None,
) -> tuple[Path, PosesReport | None]:
    """A posed scene of a folder of photos: the kept one (no report), or a new one (with its report).

    It is kept in ``PHOTOS/.idnerf/NAME``, or in the user's cache where the photos' folder cannot be written. Photos
    that were added, removed or changed are posed anew.

    Raises:
        InputError: see ``estimate_poses``.
    """
    config = config or PosesConfig()
    fingerprint = fingerprint_of(photos, config)
    for folder in kept_folders(photos):
        mark = folder / FINGERPRINT_FILE
        if mark.is_file() and mark.read_text().strip() == fingerprint:
            return folder, None
    beside, cache = kept_folders(photos)
    folder = beside if os.access(photos.resolve(), os.W_OK) else cache
    staging = folder.with_name(folder.name + ".new")
    shutil.rmtree(staging, ignore_errors=True)
    report = estimate_poses(photos, staging, config, update)
    (staging / FINGERPRINT_FILE).write_text(fingerprint)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(staging, folder)
    return folder, report


def kept_folders(photos: Path) -> tuple[Path, Path]:
    """Where the scene may be kept: beside the photos, and in the user's cache."""
    resolved = photos.resolve()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256(str(resolved).encode()).hexdigest()[:12]
    return resolved / KEPT_FOLDER / resolved.name, cache / "idnerf" / "poses" / digest / resolved.name


def fingerprint_of(photos: Path, config: PosesConfig) -> str:
    """Changes when a photo is added, removed or changed (name, bytes, time), or with the options."""
    files = photo_files(photos)
    if not files:
        raise InputError(f"{photos} holds no photos")
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    options = (config.longer_side, config.max_features, config.focal, config.seed)
    return hashlib.sha256(json.dumps([stats, options]).encode()).hexdigest()
