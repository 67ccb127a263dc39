"""The one file that knows pycolmap: features, matches, and incremental mapping tuned for few photos.

COLMAP's defaults (Schönberger and Frahm, CVPR 2016) expect dozens of photos. With three of them the baseline is
small and every match counts, so: more and weaker features, every pair matched, an initial pair of a few degrees
instead of 16, points seen by two photos kept, one camera for all photos, its lens distortion refined only where enough
photos hold it down, and several attempts from different focal lengths, of which the best supported one is kept.
"""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from idnerf.errors import InputError
from idnerf.poses.config import PosesConfig
from idnerf.poses.sparse_model import SparseModel

PHOTOS_FOR_DISTORTION = 6
"""Fewer photos bend their poses to any distortion: three forward-facing ones gave k1 = 2."""

MAX_DISTORTION = 0.3
"""A larger |k1| is no photo lens, but a focal length gone wrong."""

FOCAL_RANGE = (0.45, 3.0)
"""Focal lengths over the longer side that a photo lens has (16 to 110 mm on film)."""

KNOWN_FOCAL_SLACK = 1.25
"""Refining may change a focal length from EXIF by this factor: cropped pictures keep the EXIF of the whole."""


@dataclass(frozen=True, eq=False)
class PairMatches:
    """Matches of two photos that agree with one epipolar geometry: pixels in both, [match, 2]."""

    first: int
    second: int
    xy1: np.ndarray
    xy2: np.ndarray


@dataclass(frozen=True)
class Attempt:
    """One run of the mapper.

    Attributes:
        focal: focal length to start from, pixels.
        refine_focal, refine_distortion: what bundle adjustment may change besides poses and points.
        initial_angle: least parallax of the initial pair, degrees.
        initial_matches: least number of its matches.
    """

    focal: float
    refine_focal: bool
    refine_distortion: bool
    initial_angle: float
    initial_matches: int


def load_pycolmap() -> Any:
    """pycolmap, quiet.

    Raises:
        InputError: not installed.
    """
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        import pycolmap
    except ImportError:
        raise InputError(
            "finding poses needs pycolmap, which is not installed: pip install '.[poses]' in a checkout "
            "(or bring poses: COLMAP, transforms.json, LLFF)"
        ) from None
    # Its import installs a handler that answers SIGTERM with a stack trace; only the main thread may set another.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_terminate or signal.SIG_DFL)
    pycolmap.logging.minloglevel = pycolmap.logging.Level.FATAL.value
    return pycolmap


class Matcher:
    """Features and matches of photos in a COLMAP database."""

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        size: tuple[int, int],
        focal: float,
        workspace: Path,
        config: PosesConfig,
        *,
        thorough: bool = False,
    ) -> None:
        """
        Args:
            folder, names: upright pictures, all of ``size``.
            focal: to start from, pixels of ``size``.
            workspace: an existing folder for the database and the models.
            thorough: affine features pooled over scales: several times slower, for photos that differ much.
        """
        self.pycolmap = load_pycolmap()
        self.folder, self.names, self.size, self.focal = folder, list(names), size, focal
        self.workspace, self.config, self.thorough = workspace, config, thorough
        self.database = workspace / ("thorough.db" if thorough else "features.db")

    @property
    def steps(self) -> int:
        """How many calls of ``done`` ``run`` makes."""
        return len(self.names) + len(self.names) - 1

    def run(self, done: Callable[[], None]) -> None:
        """Find features in every photo, then match every pair."""
        pycolmap = self.pycolmap
        pycolmap.set_random_seed(self.config.seed)
        extraction = pycolmap.FeatureExtractionOptions(use_gpu=False, num_threads=self.config.thread_count)
        extraction.sift.max_num_features = self.config.features_for(len(self.names))
        extraction.sift.peak_threshold = 0.003  # half the default: smooth surfaces give few features
        extraction.sift.estimate_affine_shape = self.thorough
        extraction.sift.domain_size_pooling = self.thorough
        width, height = self.size
        for number, name in enumerate(self.names):
            reader = pycolmap.ImageReaderOptions(
                camera_model="SIMPLE_RADIAL", camera_params=f"{self.focal},{width / 2},{height / 2},0"
            )
            if number:
                reader.existing_camera_id = 1
            pycolmap.extract_features(
                self.database,
                self.folder,
                image_names=[name],
                camera_mode=pycolmap.CameraMode.SINGLE,
                reader_options=reader,
                extraction_options=extraction,
                device=pycolmap.Device.cpu,
            )
            done()
        matching = pycolmap.FeatureMatchingOptions(use_gpu=False, num_threads=self.config.thread_count)
        matching.sift.max_ratio = 0.85 if self.thorough else 0.8
        verification = pycolmap.TwoViewGeometryOptions(min_num_inliers=12)
        verification.ransac.random_seed = self.config.seed
        for second in range(1, len(self.names)):
            pairs = self.workspace / "pairs.txt"
            pairs.write_text("".join(f"{self.names[first]} {self.names[second]}\n" for first in range(second)))
            pycolmap.match_image_pairs(
                self.database,
                matching_options=matching,
                pairing_options=pycolmap.ImportedPairingOptions(match_list_path=pairs),
                verification_options=verification,
                device=pycolmap.Device.cpu,
            )
            done()

    def pairs(self) -> Iterator[PairMatches]:
        """Pairs that share an epipolar geometry."""
        with self.pycolmap.Database.open(self.database) as database:
            number = {image.image_id: self.names.index(image.name) for image in database.read_all_images()}
            keypoints = {image: np.asarray(database.read_keypoints(image))[:, :2] for image in number}
            for pair, geometry in zip(*database.read_two_view_geometries(), strict=True):
                first, second = self.pycolmap.pair_id_to_image_pair(pair)
                matches = np.asarray(geometry.inlier_matches)
                if len(matches):
                    yield PairMatches(
                        number[first], number[second], keypoints[first][matches[:, 0]], keypoints[second][matches[:, 1]]
                    )

    def map(self, attempt: Attempt) -> list[SparseModel]:
        """Models of two or more photos that one run of the mapper finds; none when it fails."""
        pycolmap = self.pycolmap
        with pycolmap.Database.open(self.database) as database:
            camera = database.read_all_cameras()[0]
            camera.params = [attempt.focal, self.size[0] / 2, self.size[1] / 2, 0.0]
            database.update_camera(camera)
        options = pycolmap.IncrementalPipelineOptions(
            min_model_size=2,
            min_num_matches=12,
            max_num_models=5,
            num_threads=self.config.thread_count,
            random_seed=self.config.seed,
            ba_refine_focal_length=attempt.refine_focal,
            ba_refine_extra_params=attempt.refine_distortion,
            min_focal_length_ratio=FOCAL_RANGE[0],
            max_focal_length_ratio=FOCAL_RANGE[1],
            max_extra_param=MAX_DISTORTION,
        )
        options.mapper.random_seed = options.triangulation.random_seed = self.config.seed
        options.mapper.init_min_tri_angle = attempt.initial_angle
        options.mapper.init_min_num_inliers = attempt.initial_matches
        options.mapper.init_max_reg_trials = 3
        options.mapper.abs_pose_min_num_inliers = 12
        options.mapper.abs_pose_min_inlier_ratio = 0.15
        options.mapper.abs_pose_refine_focal_length = attempt.refine_focal
        options.mapper.abs_pose_refine_extra_params = attempt.refine_distortion
        options.mapper.filter_min_tri_angle = options.triangulation.min_angle = 0.3
        options.triangulation.ignore_two_view_tracks = False
        models = self.workspace / "models"
        models.mkdir(exist_ok=True)
        found = pycolmap.incremental_mapping(self.database, self.folder, models, options=options)
        return [self._model(found[key]) for key in sorted(found)]

    def _model(self, found: Any) -> SparseModel:
        images = sorted((image for image in found.images.values() if image.has_pose), key=lambda image: image.name)
        w2c = np.tile(np.eye(4), (len(images), 1, 1))
        points = {identity: row for row, identity in enumerate(found.points3D)}
        view, point, xy = [], [], []
        for row, image in enumerate(images):
            w2c[row, :3] = image.cam_from_world().matrix()
            for seen in image.points2D:
                if seen.has_point3D():
                    view.append(row)
                    point.append(points[seen.point3D_id])
                    xy.append(seen.xy)
        focal, _, _, k1 = found.cameras[images[0].camera_id].params
        solid = list(found.points3D.values())
        return SparseModel(
            photos=np.array([self.names.index(image.name) for image in images]),
            w2c=w2c,
            size=self.size,
            focal=float(focal),
            k1=float(k1),
            points=np.array([p.xyz for p in solid]).reshape(-1, 3),
            colors=np.array([p.color for p in solid], dtype=np.uint8).reshape(-1, 3),
            view=np.array(view, dtype=np.int64),
            point=np.array(point, dtype=np.int64),
            xy=np.array(xy, dtype=np.float64).reshape(-1, 2),
        )


def attempts(count: int, focal: float, focal_known: bool, size: tuple[int, int]) -> list[Attempt]:
    """What to try, in this order, for ``count`` photos.

    Two photos cannot tell the focal length: it stays where it starts.
    """
    refine, distortion = count >= 3, count >= PHOTOS_FOR_DISTORTION
    starts = [focal] if focal_known else [focal, 1.4 * max(size), 0.6 * max(size)]
    if not refine:
        starts = starts[:1]
    # Distortion refined from the first three photos on may run away before the others hold it: then without.
    tries = [
        Attempt(start, refine, d, 2.0, 50) for start in starts for d in ((True, False) if distortion else (False,))
    ]
    tries += [Attempt(start, refine, False, 0.7, 15) for start in starts]
    return [*tries, Attempt(focal, False, False, 0.7, 15)]


def plausible(model: SparseModel, attempt: Attempt, focal: float, focal_known: bool) -> bool:
    """Whether bundle adjustment ended at a lens that exists (near the known one, if it is known)."""
    if focal_known:
        low, high = focal / KNOWN_FOCAL_SLACK, focal * KNOWN_FOCAL_SLACK
    else:
        low, high = (ratio * max(model.size) for ratio in FOCAL_RANGE)
    return low <= model.focal <= high and abs(model.k1) <= MAX_DISTORTION and bool(np.isfinite(model.points).all())


def best_model(matcher: Matcher, focal: float, focal_known: bool) -> SparseModel | None:
    """The best of several attempts: most photos registered, then the best supported; None when all fail.

    Up to five photos try every focal length (each takes a second or two, and a bad start can hold them); more photos
    stop at the first attempt that registers all of them.
    """
    count, best, score = len(matcher.names), None, (0, 0.0)
    focals_tried = set()
    for attempt in attempts(count, focal, focal_known, matcher.size):
        complete = best is not None and len(best) == count
        if complete and (count > 5 or attempt.focal in focals_tried):
            continue
        focals_tried.add(attempt.focal)
        for model in matcher.map(attempt):
            if plausible(model, attempt, focal, focal_known) and (len(model), model.support()) > score:
                best, score = model, (len(model), model.support())
    return best
