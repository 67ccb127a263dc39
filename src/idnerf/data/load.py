"""Recognise the format of a folder and read it as a ``Scene``."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import numpy as np
import torch

from idnerf.data import blender, colmap, dtu, llff, transforms
from idnerf.data.bounds import bounds_from_depths, bounds_from_images
from idnerf.data.image_io import list_images
from idnerf.data.notes import say_note
from idnerf.data.photo import PosedPhoto, matched_to_file
from idnerf.data.scene import Scene
from idnerf.errors import InputError
from idnerf.types import Cameras

LOOKED_FOR = (
    "poses_bounds.npy (LLFF), transforms.json (nerfstudio, instant-ngp), transforms_train.json (Blender), "
    "sparse/0/cameras.bin or .txt (COLMAP), Cameras/train with Rectified (DTU)"
)

FLOAT32_ROUNDING = 2.0**-24
MOST_ROUNDING = 1e-4
"""A world is moved to its origin where rounding to float32 moves a camera by more than this share of the distances
between the cameras, or of near."""


@dataclass(frozen=True)
class SceneSpec:
    """Where one scene is; ``load_scene`` takes it like a path."""

    path: Path
    scan: str | None = None
    light: int = 3

    @property
    def name(self) -> str:
        return self.scan or _name(self.path)


def load_scene(
    path: str | Path | SceneSpec,
    *,
    size: tuple[int, int] | None = None,
    scan: str | None = None,
    light: int = 3,
) -> Scene:
    """Read a scene; its format is recognised (docs/data.md).

    Pictures are not decoded yet, except small ones of a scene whose format gives no depth range.

    Args:
        path: a scene folder, its ``transforms*.json``, or an entry of ``find_scenes``.
        size: (width, height) to work at; None keeps the size of the pictures.
        scan: which scan of a DTU root ("scan24" or "24"); the only one by default.
        light: which light of DTU, 0 to 6.

    Raises:
        InputError: not a scene (names what was looked for), or a broken one (names the file and what is
            wrong).
    """
    if isinstance(path, SceneSpec):
        path, scan, light = path.path, scan or path.scan, path.light
    root = Path(path).expanduser()
    if size is not None and min(size) < 1:
        raise InputError(f"size {size[0]}x{size[1]}: width and height must be at least 1 pixel")
    scene_format = recognise(root)
    if scene_format is None:
        raise InputError(_not_a_scene(root))
    if scan is not None and scene_format != "dtu":
        raise InputError(f"scan {scan} was asked for, but {root} is a {scene_format} scene; only DTU roots have scans")
    view_ids: Sequence[int] | None = None
    name = _name(root)
    if scene_format == "llff":
        photos = llff.read_llff(root, size)
    elif scene_format == "transforms":
        file = root if root.is_file() else root / transforms.TRANSFORMS_FILE
        scene_format, photos = transforms.read_transforms(file)
    elif scene_format == "blender":
        photos = blender.read_blender(root if root.is_file() else root / blender.BLENDER_FILE)
    elif scene_format == "colmap":
        photos = colmap.read_colmap(root, size)
    else:
        name = dtu.choose_scan(root, scan)
        view_ids, photos = dtu.read_dtu(root, name, light)
    return _assemble(name, scene_format, root.parent if root.is_file() else root, photos, view_ids, size)


def demo_folder() -> Path:
    """The scene that comes with the package: five photos, 320x240, of a procedural scene, with exact cameras."""
    return Path(str(resources.files("idnerf") / "demo_scene"))


def recognise(path: Path) -> str | None:
    """ "llff", "transforms", "blender", "colmap", "dtu", or None. What gives a depth range is looked for
    first."""
    if path.is_file() and path.suffix == ".json":
        return "transforms" if path.name == transforms.TRANSFORMS_FILE else "blender"
    if (path / llff.POSES_FILE).is_file():
        return "llff"
    if (path / transforms.TRANSFORMS_FILE).is_file():
        return "transforms"
    if (path / blender.BLENDER_FILE).is_file():
        return "blender"
    if colmap.model_folder(path) is not None:
        return "colmap"
    if (path / "Cameras" / "train").is_dir() and (path / "Rectified").is_dir():
        return "dtu"
    return None


def find_scenes(path: str | Path, *, scan: str | None = None, light: int = 3) -> list[SceneSpec]:
    """A scene gives itself; a DTU root its scans (or the one named); any other folder the scenes up to two
    levels below it, in the order of their names.

    Raises:
        InputError: no scene there.
    """
    root = Path(path).expanduser()
    found = _scenes_below(root, scan, light, levels=2)
    if not found:
        raise InputError(_not_a_scene(root))
    return found


def distinct_names(specs: Sequence[SceneSpec]) -> list[str]:
    """The scenes' names; those that several scenes share become paths below the scenes' common folder."""
    names = [spec.name for spec in specs]
    folders = [(spec.path.parent if spec.path.is_file() else spec.path).resolve() for spec in specs]
    common = os.path.commonpath([folder.parent for folder in folders]) if folders else ""
    return [
        name if names.count(name) == 1 else (folder / (spec.scan or "")).relative_to(common).as_posix()
        for name, folder, spec in zip(names, folders, specs, strict=True)
    ]


def _scenes_below(root: Path, scan: str | None, light: int, levels: int) -> list[SceneSpec]:
    scene_format = recognise(root)
    if scene_format == "dtu":
        names = dtu.scans(root) if scan is None else [dtu.choose_scan(root, scan)]
        return [SceneSpec(root, name, light) for name in names]
    if scene_format is not None:
        return [SceneSpec(root, scan)]
    if levels == 0 or not root.is_dir():
        return []
    children = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    return [spec for child in children if _readable(child) for spec in _scenes_below(child, scan, light, levels - 1)]


def _readable(folder: Path) -> bool:
    """Whether we may look into a folder: a search for scenes passes by the others (such as a disk's lost+found)."""
    return os.access(folder, os.R_OK | os.X_OK)


def _name(root: Path) -> str:
    return (root.parent if root.is_file() else root).resolve().name


def _not_a_scene(root: Path) -> str:
    if not root.exists():
        return f"{root} does not exist; expected a scene folder"
    if not root.is_dir():
        return f"{root} is a file; expected a scene folder, with {LOOKED_FOR}"
    below = _scenes_below(root, None, 3, levels=2)
    if below:
        names = ", ".join(str(spec.path.relative_to(root)) for spec in below[:4])
        more = ", ..." if len(below) > 4 else ""
        return f"{root} is no scene but holds some: name one of them ({names}{more})"
    if (root / "Cameras" / "train").is_dir() or (root / "Rectified").is_dir():
        lacking = "Rectified" if (root / "Cameras" / "train").is_dir() else "Cameras/train"
        return f"{root} looks like DTU but has no {lacking}"
    pictures = len(list_images(root)) or len(list_images(root / "images"))
    hint = (
        f"; it has {pictures} picture{'s' if pictures > 1 else ''} without poses: `idnerf poses` finds them"
        if pictures
        else ""
    )
    return f"{root} is no scene: found none of {LOOKED_FOR}{hint}"


def _assemble(
    name: str,
    scene_format: str,
    root: Path,
    photos: Sequence[PosedPhoto],
    view_ids: Sequence[int] | None,
    size: tuple[int, int] | None,
) -> Scene:
    if len(photos) < 2:
        raise InputError(f"{root} has {len(photos)} posed photo; expected at least 2")
    photos, offset = _near_origin(matched_to_file(photos), root)
    cameras = Cameras(
        c2w=torch.from_numpy(np.stack([photo.c2w for photo in photos])).float(),
        K=torch.stack([photo.pinhole_K for photo in photos]).float(),
        size=photos[0].size,
        near=torch.tensor([math.nan if photo.near is None else photo.near for photo in photos]),
        far=torch.tensor([math.nan if photo.far is None else photo.far for photo in photos]),
    )
    _check_numbers(cameras, photos)
    scene = Scene(
        name=name,
        format=scene_format,
        root=root,
        cameras=cameras,
        image_names=tuple(photo.path.name for photo in photos),
        view_ids=tuple(range(len(photos)) if view_ids is None else view_ids),
        photos=tuple(replace(photo, observed_depths=None) for photo in photos),
        world_offset=offset,
    )
    if cameras.near.isnan().any():
        scene = replace(scene, cameras=_with_inferred_bounds(scene, photos))
    return scene if size is None else scene.resized(size)


def _near_origin(photos: Sequence[PosedPhoto], root: Path) -> tuple[list[PosedPhoto], tuple[float, float, float]]:
    """Photos whose world lies so far from its origin that float32 would blur it (maps, Earth-centred coordinates),
    moved so that the mean camera centre is the origin; and what was taken off. Others stay as they are."""
    centers = np.stack([photo.c2w[:3, 3] for photo in photos])
    mean = centers.mean(0)
    spread = float(np.abs(centers - mean).max())
    lengths = [length for length in (spread, *(photo.near for photo in photos)) if length is not None and length > 0]
    rounding = float(np.abs(centers).max()) * FLOAT32_ROUNDING
    if np.abs(mean).max() <= 10 * spread or not lengths or rounding <= MOST_ROUNDING * min(lengths):
        return list(photos), (0.0, 0.0, 0.0)
    x, y, z = mean.tolist()
    say_note(
        f"the cameras of {root} are around ({x:.10g}, {y:.10g}, {z:.10g}), too far from the origin for single "
        "precision: positions are relative to that point"
    )
    return [replace(photo, c2w=_translated(photo.c2w, -mean)) for photo in photos], (x, y, z)


def _translated(c2w: np.ndarray, shift: np.ndarray) -> np.ndarray:
    moved = c2w.copy()
    moved[:3, 3] += shift
    return moved


def _check_numbers(cameras: Cameras, photos: Sequence[PosedPhoto]) -> None:
    """What is finite and positive in a file may be neither, or no camera, in float32."""
    for photo, camera in zip(photos, (cameras[i] for i in range(len(cameras))), strict=True):
        fx, fy, longer = float(camera.K[0, 0]), float(camera.K[1, 1]), max(camera.size)
        if not (camera.K.isfinite().all() and 1e-4 * longer < min(fx, fy) and max(fx, fy) < 1e6 * longer):
            raise InputError(
                f"the camera of {photo.path} has focal lengths of {fx:g}, {fy:g} pixels and its centre at "
                f"{float(camera.K[0, 2]):g}, {float(camera.K[1, 2]):g}, for {camera.width}x{camera.height}; no camera "
                "is like that"
            )
        if not camera.c2w.isfinite().all():
            raise InputError(f"the pose of {photo.path} is too far from the origin for single precision")
        if photo.near is not None:
            _check_range(photo, camera)


def _check_range(photo: PosedPhoto, camera: Cameras) -> None:
    near, far = float(camera.near), float(camera.far)
    if not 0 < near < far < math.inf:
        raise InputError(
            f"near, far of {photo.path} are {near:g}, {far:g} in single precision; expected 0 < near < far"
        )


def _with_inferred_bounds(scene: Scene, photos: Sequence[PosedPhoto]) -> Cameras:
    """Depth ranges for the cameras that lack one: from the format's 3D points, else from the pictures."""
    cameras = scene.cameras
    inferred = bounds_from_depths([photo.observed_depths for photo in photos])
    if inferred is None:

        def read(index: int, size: tuple[int, int]) -> torch.Tensor:
            return scene.photos[index].read_thumbnail(scene.resized(size).cameras.K[index], size)

        inferred = bounds_from_images(cameras, read)
    lacking = cameras.near.isnan()
    cameras = cameras.with_bounds(
        torch.where(lacking, inferred[0], cameras.near), torch.where(lacking, inferred[1], cameras.far)
    )
    for index, photo in enumerate(photos):
        _check_range(photo, cameras[index])
    return cameras
