"""Write a posed scene: undistorted pictures, ``transforms.json`` with near and far, and a COLMAP text model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from idnerf.data.bounds import bounds_from_depths
from idnerf.data.distortion import Lens, distort, pinhole_intrinsics, undistort
from idnerf.data.image_io import image_size, read_image
from idnerf.errors import InputError
from idnerf.geometry.quaternions import quaternion_of
from idnerf.poses.photos import PhotoSet, is_upright
from idnerf.poses.sparse_model import SparseModel

JPEG_QUALITY = 95
OPENCV_TO_OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])


def lens_of(model: SparseModel) -> Lens | None:
    return Lens("perspective", (model.k1,)) if model.k1 else None


def pinhole_K(model: SparseModel) -> np.ndarray:
    """3x3 of the undistorted pictures."""
    lens = lens_of(model)
    K = torch.from_numpy(model.K)
    return (K if lens is None else pinhole_intrinsics(lens, K, model.size)).numpy()


def undistorted_xy(model: SparseModel) -> np.ndarray:
    """[observation, 2] where the observations lie in the undistorted pictures.

    The lens is inverted by fixed-point iteration, which converges for the mild distortions that are accepted.
    """
    center = np.array(model.size) / 2
    K = pinhole_K(model)
    bent = torch.from_numpy((model.xy - center) / model.focal)
    lens, ideal = lens_of(model), bent
    if lens is not None:
        for _ in range(20):
            ideal = ideal + bent - distort(ideal, lens)
    return ideal.numpy() * K[[0, 1], [0, 1]] + center


def bounds(model: SparseModel) -> tuple[np.ndarray, np.ndarray]:
    """near, far of every view from the depths it observes (docs/data.md, rule 1).

    Raises:
        InputError: too few points for any view.
    """
    inferred = bounds_from_depths(model.observed_depths())
    if inferred is None:
        raise InputError(
            f"only {len(model.points)} points were found in 3D, too few for a depth range; take photos "
            "that overlap more, of a scene with texture"
        )
    return inferred[0].double().numpy(), inferred[1].double().numpy()


def output_names(photos: PhotoSet) -> list[str]:
    """File names in the scene: the photos' own where they are JPEG or PNG, else with .png."""
    names = []
    for path in photos.paths:
        same = path.suffix.lower() in (".jpg", ".jpeg", ".png")
        name = path.name if same else path.stem + ".png"
        names.append(path.name + ".png" if name in names or (not same and path.with_name(name).exists()) else name)
    return names


def write_scene(photos: PhotoSet, model: SparseModel, folder: Path, done: Callable[[], None]) -> None:
    """``images/``, ``transforms.json`` and ``sparse/0`` in an existing, empty folder. ``model`` is in pixels of
    ``photos.size``."""
    names = [output_names(photos)[i] for i in model.photos]
    (folder / "images").mkdir()
    for number, name in zip(model.photos, names, strict=True):
        write_picture(photos.paths[number], photos.size, model, folder / "images" / name)
        done()
    write_transforms(model, names, folder / "transforms.json")
    write_colmap_text(model, names, folder / "sparse" / "0")


def write_picture(photo: Path, size: tuple[int, int], model: SparseModel, out: Path) -> None:
    """The undistorted picture, upright, at ``size``; the file itself where nothing has to change."""
    lens = lens_of(model)
    if lens is None and is_upright(photo) and image_size(photo) == size and photo.suffix == out.suffix:
        shutil.copyfile(photo, out)
        return
    image = read_image(photo, size)
    if lens is not None:
        image = undistort(image, lens, torch.from_numpy(model.K), torch.from_numpy(pinhole_K(model)))
    picture = Image.fromarray((image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
    if out.suffix.lower() == ".png":
        picture.save(out, compress_level=3)
    else:
        picture.save(out, quality=JPEG_QUALITY, subsampling=0)


def write_transforms(model: SparseModel, names: list[str], path: Path) -> None:
    """nerfstudio's format: c2w in OpenGL axes, one pinhole camera, near and far per frame."""
    K = pinhole_K(model)
    near, far = bounds(model)
    frames = [
        {
            "file_path": f"images/{name}",
            "transform_matrix": (c2w @ OPENCV_TO_OPENGL).tolist(),
            "near": float(near[i]),
            "far": float(far[i]),
        }
        for i, (name, c2w) in enumerate(zip(names, model.c2w, strict=True))
    ]
    content = {
        "camera_model": "PINHOLE",
        "w": model.size[0],
        "h": model.size[1],
        "fl_x": float(K[0, 0]),
        "fl_y": float(K[1, 1]),
        "cx": float(K[0, 2]),
        "cy": float(K[1, 2]),
        "frames": frames,
    }
    path.write_text(json.dumps(content, indent=1))


def write_colmap_text(model: SparseModel, names: list[str], folder: Path) -> None:
    """COLMAP's text format: cameras.txt, images.txt, points3D.txt of the undistorted pictures."""
    folder.mkdir(parents=True)
    K, xy, errors = pinhole_K(model), undistorted_xy(model), model.errors()
    width, height = model.size
    camera = " ".join(repr(float(v)) for v in (K[0, 0], K[1, 1], K[0, 2], K[1, 2]))
    (folder / "cameras.txt").write_text(
        f"# CAMERA_ID MODEL WIDTH HEIGHT fx fy cx cy\n1 PINHOLE {width} {height} {camera}\n"
    )
    lines = ["# IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME, then X Y POINT3D_ID ..."]
    place = np.zeros(len(model.xy), dtype=np.int64)
    for i, name in enumerate(names):
        seen = np.flatnonzero(model.view == i)
        place[seen] = np.arange(len(seen))
        pose = [*quaternion_of(model.w2c[i, :3, :3]), *model.w2c[i, :3, 3]]
        lines.append(f"{i + 1} {' '.join(repr(float(v)) for v in pose)} 1 {name}")
        lines.append(" ".join(f"{xy[n, 0]:.3f} {xy[n, 1]:.3f} {model.point[n] + 1}" for n in seen))
    (folder / "images.txt").write_text("\n".join(lines) + "\n")
    order = np.argsort(model.point, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(model.point[order])) + 1) if len(order) else []
    lines = ["# POINT3D_ID X Y Z R G B ERROR, then IMAGE_ID POINT2D_IDX ..."]
    for group in groups:
        p = model.point[group[0]]
        position = " ".join(f"{v:.6g}" for v in model.points[p])
        track = " ".join(f"{model.view[n] + 1} {place[n]}" for n in group)
        lines.append(
            f"{p + 1} {position} {' '.join(map(str, model.colors[p].tolist()))} {errors[group].mean():.4f} {track}"
        )
    (folder / "points3D.txt").write_text("\n".join(lines) + "\n")
