"""From a folder of photos to a posed scene on disk, and a report of how well it went."""

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from idnerf import __version__
from idnerf.errors import InputError
from idnerf.poses.config import PosesConfig
from idnerf.poses.parallax import turning_residual
from idnerf.poses.photos import PhotoSet, feature_size, find_photos, write_feature_images
from idnerf.poses.scene_files import bounds, pinhole_K, write_scene
from idnerf.poses.sparse_model import SparseModel
from idnerf.poses.structure_from_motion import Matcher, PairMatches, best_model, load_pycolmap

REPORT_FILE = "poses.json"

MIN_MATCHES = 30
"""Matches between the best two photos below which nothing is attempted to be believed."""

MIN_POINTS = 30
"""A model of fewer points is chance."""

MAX_MEAN_ERROR_PX = 2.0
"""A model that reprojects worse is wrong."""

TURNING_PX, TURNING_SHARE = 1.0, 0.0015
"""Pairs that a turning camera explains within this many pixels, or this share of the longer side if that is more
(what a lens does beyond k1 grows with the picture), show no parallax."""

OUTLIER_PX = 2.0
"""Observations that reproject worse are left out of the written model and of the depth range."""

THOROUGH_UP_TO = 20
"""With up to this many photos, those that were not registered are worth a second, slower look."""

Update = Callable[[int, int], None]


@dataclass(frozen=True)
class PosesReport:
    """How well posing went; written as ``poses.json`` into the scene. Pixels are those of the written pictures."""

    registered: tuple[str, ...]
    """Photos with a pose."""
    unregistered: tuple[str, ...]
    """Photos without."""
    size: tuple[int, int]
    """(width, height) of the written pictures."""
    focal: float
    """Focal length of the undistorted pictures."""
    focal_start: str
    """Where the search for the focal length started: given, EXIF or guessed."""
    k1: float
    """Radial distortion that was undone."""
    points: int
    """Points in 3D."""
    observations: int
    """Where photos see them."""
    reprojection_error_px: float
    """Mean over the observations, in pixels of the pictures."""
    feature_error_px: float
    """The same in pixels of the shrunk pictures that the features were found in."""
    parallax_degrees: float
    """Median over the points of the widest angle between two of their rays."""
    near: float
    far: float
    """Depth range over all views, in scene units: the nearest near is 1."""
    seconds: float

    def lines(self) -> list[str]:
        """For people."""
        count = len(self.registered) + len(self.unregistered)
        lines = [
            f"registered {len(self.registered)} of {count} photos; {self.points} points, reprojection error "
            f"{self.reprojection_error_px:.2f} px at {self.size[0]}x{self.size[1]}, median parallax "
            f"{self.parallax_degrees:.1f} degrees",
            f"focal length {self.focal:.0f} px ({self.focal / max(self.size):.2f} x the longer side; "
            f"{self.focal_start} to start from), lens distortion k1 {self.k1:+.3f}, "
            f"near {self.near:.3g}, far {self.far:.3g}; {self.seconds:.0f} s",
        ]
        if self.unregistered:
            lines.append(
                f"left out: {', '.join(self.unregistered)} (too few matches with the others: photos should "
                "overlap by two thirds)"
            )
        return lines


def estimate_poses(
    photos: str | Path,
    out: str | Path,
    config: PosesConfig | None = None,
    update: Update | None = None,
) -> PosesReport:
    """Pose a folder of photos and write the scene ``out``: images, transforms.json, sparse/0, poses.json.

    The folder appears complete or not at all.

    Args:
        photos: folder of pictures, or with a folder ``images``.
        out: a new or empty folder.
        update: called with (steps done, steps in all).

    Raises:
        InputError: no or bad photos, or photos that cannot be posed: the message says what to do.
    """
    photos, out = Path(photos).expanduser(), Path(out).expanduser()
    config = config or PosesConfig()
    start = time.perf_counter()
    check_new(out)
    load_pycolmap()
    found = find_photos(photos, config.focal)
    steps = Steps(update or (lambda done, total: None), expected_steps(len(found.paths)))
    with tempfile.TemporaryDirectory(prefix="idnerf-poses-") as temporary:
        model = reconstruct(found, Path(temporary), config, steps.done)
    feature_error = float(model.errors().mean())
    model = model.scaled(found.size)
    model = model.normalised(float(bounds(model)[0].min()))
    report = make_report(found, model, feature_error, time.perf_counter() - start)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        staging = Path(temporary) / "scene"
        staging.mkdir()
        write_scene(found, model, staging, steps.done)
        content = {"idnerf": __version__, "photos": str(photos), **asdict(report)}
        (staging / REPORT_FILE).write_text(json.dumps(content, indent=1))
        if out.exists():
            out.rmdir()
        os.rename(staging, out)
    return report


def expected_steps(photos: int) -> int:
    """Shrinking, finding features, matching, writing: one step a photo each."""
    return 4 * photos


class Steps:
    """Counts what is done and tells ``update``."""

    def __init__(self, update: Update, total: int) -> None:
        self.update, self.total, self.count = update, total, 0

    def done(self) -> None:
        self.count += 1
        self.update(self.count, max(self.total, self.count))


def check_new(out: Path) -> None:
    """Raises InputError when ``out`` exists and is not an empty folder, before any work."""
    if not out.name or out.name == "..":
        raise InputError(f"expected the name of a new folder for --out, got {str(out)!r}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: expected a new or empty folder for --out, found something there; choose another")


def reconstruct(photos: PhotoSet, workspace: Path, config: PosesConfig, done: Callable[[], None]) -> SparseModel:
    """The best model of the photos, in pixels of the feature images.

    Raises:
        InputError: a photo that cannot be read, or photos that cannot be posed.
    """
    size = feature_size(photos.size, config.longer_side)
    focal = photos.focal * max(size) / max(photos.size)
    pictures = workspace / "pictures"
    names = write_feature_images(photos, size, pictures, done)
    model, pairs = None, []
    for thorough in (False, True):
        matcher = Matcher(pictures, names, size, focal, workspace, config, thorough=thorough)
        matcher.run(done)
        pairs = list(matcher.pairs())
        check_parallax(pairs, size)
        candidate = best_model(matcher, focal, photos.focal_known)
        if candidate is not None and (model is None or len(candidate) > len(model)):
            model = candidate
        if len(names) > THOROUGH_UP_TO or (model is not None and len(model) == len(names)):
            break
    return checked(model, pairs, photos)


def check_parallax(pairs: list[PairMatches], size: tuple[int, int]) -> None:
    """Raises InputError when turning on the spot explains every pair that matches well."""
    threshold = max(TURNING_PX, TURNING_SHARE * max(size))
    enough = [pair for pair in pairs if len(pair.xy1) >= MIN_MATCHES]
    # Pairs with few matches are usually those farthest apart: one of them settles it.
    enough.sort(key=lambda pair: len(pair.xy1))
    if enough and all(turning_residual(pair.xy1, pair.xy2, size) < threshold for pair in enough):
        raise InputError(
            "the photos show no parallax: they were taken from one place, the camera only turned (or the scene is too "
            "far away); step sideways by about a tenth of the distance between photos"
        )


def checked(model: SparseModel | None, pairs: list[PairMatches], photos: PhotoSet) -> SparseModel:
    """The model without its outliers. Raises InputError, with what to do, when there is none worth having."""
    advice = "take photos of a still, textured scene that overlap by two thirds, one small step sideways each"
    best = max((len(pair.xy1) for pair in pairs), default=0)
    if best < MIN_MATCHES:
        raise InputError(
            f"too few matches between the {len(photos.paths)} photos (the best two share {best}, at least "
            f"{MIN_MATCHES} are needed): {advice}"
        )
    if model is None:
        raise InputError(f"the photos match (the best two share {best} points) but no poses explain them: {advice}")
    kept = model.without_outliers(OUTLIER_PX)
    if len(kept.points) < MIN_POINTS or float(model.errors().mean()) > MAX_MEAN_ERROR_PX:
        raise InputError(
            f"the poses found are not to be trusted ({len(kept.points)} points, mean reprojection error "
            f"{float(model.errors().mean()):.1f} px): {advice}"
        )
    return kept


def make_report(photos: PhotoSet, model: SparseModel, feature_error: float, seconds: float) -> PosesReport:
    near, far = bounds(model)
    registered = set(model.photos.tolist())
    return PosesReport(
        registered=tuple(photos.paths[i].name for i in model.photos),
        unregistered=tuple(path.name for i, path in enumerate(photos.paths) if i not in registered),
        size=photos.size,
        focal=float(pinhole_K(model)[0, 0]),
        focal_start=photos.focal_source,
        k1=model.k1,
        points=len(model.points),
        observations=len(model.xy),
        reprojection_error_px=float(model.errors().mean()),
        feature_error_px=feature_error,
        parallax_degrees=float(np.median(model.parallax_degrees())),
        near=float(near.min()),
        far=float(far.max()),
        seconds=seconds,
    )
