"""Rendered views as a data set for other programs: nerfstudio's ``transforms.json`` and a COLMAP model side by side.

FOLDER/images/*.png, transforms.json          nerfstudio, instant-ngp, idnerf.load_scene
FOLDER/sparse/0/{cameras,images,points3D}.txt COLMAP, Gaussian splatting trainers
FOLDER/points.ply, depth/*                    the fused cloud; depth maps where asked for
"""

import json
from pathlib import Path

import torch

from idnerf.data.image_io import write_png
from idnerf.export.atomic import whole_folder
from idnerf.export.depth_files import depth_scale, write_depth
from idnerf.export.depth_views import DepthViews
from idnerf.export.ply import write_ply
from idnerf.export.point_cloud import PointCloud
from idnerf.geometry.cameras import invert_rigid
from idnerf.geometry.quaternions import quaternion_of
from idnerf.types import Cameras

MOST_POINTS = 200_000
"""Points of the COLMAP model, every k-th of a larger cloud: a text file of millions helps nobody."""

NERFSTUDIO_SCALE = 1e-3
"""Scene units per step of a depth PNG that nerfstudio assumes; another is told to its command line, not read."""
NERFSTUDIO_DEPTHS = (1.0, 65.5)
"""Farthest depths that 16 bits hold at this scale, and that are not coarser than a thousandth there."""

OPENCV_TO_OPENGL = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0]))


def write_dataset(
    folder: Path,
    views: DepthViews,
    cloud: PointCloud,
    depth_suffix: str | None = None,
) -> float | None:
    """Write views, cameras, depth range and points; the folder appears complete or not at all.

    Args:
        depth_suffix: also write depth maps: ".npy", ".png" or ".exr".

    Returns:
        Scene units per step of depth PNGs, None where there are none.

    Raises:
        InputError: the folder exists and is not empty, or cannot be written.
    """
    scale = dataset_depth_scale(float(views.depth.max()))
    with whole_folder(folder) as place:
        frames = []
        for number in range(len(views)):
            name = f"{number:04d}.png"
            write_png(place / "images" / name, views.images[number])
            frame = frame_entry(views.cameras[number], f"images/{name}")
            if depth_suffix is not None:
                frame["depth_file_path"] = f"depth/{number:04d}{depth_suffix}"
                write_depth(place / str(frame["depth_file_path"]), views.depth[number], scale)
            frames.append(frame)
        content: dict[str, object] = {"camera_model": "OPENCV", "ply_file_path": "points.ply"}
        if depth_suffix == ".png":
            content["depth_unit_scale_factor"] = scale
        (place / "transforms.json").write_text(json.dumps({**content, "frames": frames}, indent=1))
        write_ply(place / "points.ply", cloud.points, cloud.colors)
        write_colmap(place / "sparse" / "0", views.cameras, cloud)
    return scale if depth_suffix == ".png" else None


def dataset_depth_scale(far: float) -> float:
    """Scene units per step of depth PNGs that reach ``far``: nerfstudio's own where it serves, else the finest."""
    return NERFSTUDIO_SCALE if NERFSTUDIO_DEPTHS[0] <= far <= NERFSTUDIO_DEPTHS[1] else depth_scale(far)


def frame_entry(camera: Cameras, file_path: str) -> dict[str, object]:
    """One camera as an entry of ``transforms.json`` (OpenGL axes)."""
    K = camera.K.double()
    return {
        "file_path": file_path,
        "w": camera.width,
        "h": camera.height,
        "fl_x": float(K[0, 0]),
        "fl_y": float(K[1, 1]),
        "cx": float(K[0, 2]),
        "cy": float(K[1, 2]),
        "near": float(camera.near),
        "far": float(camera.far),
        "transform_matrix": (camera.c2w @ OPENCV_TO_OPENGL).tolist(),
    }


def write_colmap(folder: Path, cameras: Cameras, cloud: PointCloud) -> None:
    """A COLMAP text model: one PINHOLE camera per view, no feature tracks. Its pixel centres are at +0.5 like ours."""
    folder.mkdir(parents=True)
    camera_lines, image_lines = [], []
    w2c = invert_rigid(cameras.c2w.double())
    for number in range(len(cameras)):
        K = cameras.K[number].double()
        values = " ".join(f"{float(v):.12g}" for v in (K[0, 0], K[1, 1], K[0, 2], K[1, 2]))
        camera_lines.append(f"{number + 1} PINHOLE {cameras.width} {cameras.height} {values}")
        pose = [*quaternion_of(w2c[number, :3, :3].numpy()).tolist(), *w2c[number, :3, 3].tolist()]
        image_lines.append(f"{number + 1} {' '.join(f'{v:.12g}' for v in pose)} {number + 1} {number:04d}.png\n")
    step = max(1, -(-len(cloud) // MOST_POINTS))
    colors = (cloud.colors[::step].clamp(0, 1) * 255).round().int().tolist()
    point_lines = [
        f"{i + 1} {x:.7g} {y:.7g} {z:.7g} {r} {g} {b} 0"
        for i, ((x, y, z), (r, g, b)) in enumerate(zip(cloud.points[::step].tolist(), colors, strict=True))
    ]
    for name, lines in (("cameras", camera_lines), ("images", image_lines), ("points3D", point_lines)):
        (folder / f"{name}.txt").write_text("\n".join([f"# idnerf: {len(lines)} {name}", *lines]) + "\n")
