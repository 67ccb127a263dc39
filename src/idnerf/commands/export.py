"""`idnerf export`: point clouds, meshes, depth maps and data sets from a few photos."""

import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from idnerf.commands.options import (
    check_frames,
    check_num_sources,
    check_quality,
    check_writable,
    choose_device,
    load_model,
    parse_size,
    parse_views,
    posed,
    progress_bar,
    working_size,
)
from idnerf.data.load import load_scene
from idnerf.data.scene import Scene
from idnerf.errors import InputError
from idnerf.export.atomic import check_new_folder
from idnerf.export.consistency import FilterConfig, filtered_depth
from idnerf.export.dataset import NERFSTUDIO_SCALE, write_dataset
from idnerf.export.depth_files import DEPTH_SUFFIXES, depth_scale, write_depth
from idnerf.export.depth_views import DepthViews, nearest_sources, render_depth_views, spread_pairs
from idnerf.export.gltf import upright, write_glb
from idnerf.export.marching_cubes import require_scikit_image
from idnerf.export.mesh import MeshConfig, fuse_mesh
from idnerf.export.ply import write_ply
from idnerf.export.point_cloud import PointCloud, fuse_points, voxel_downsample
from idnerf.geometry.trajectories import camera_path
from idnerf.types import Cameras, Views

KINDS = {
    "cloud": (".ply",),
    "mesh": (".ply", ".glb"),
    "depth": DEPTH_SUFFIXES,
    "dataset": ("",),
}
"""What can be written, and the endings of --out for each."""
PLACES = ("sources", "interpolate", "spiral", "orbit")


def export(
    scene: tyro.conf.Positional[Path],
    out: Path,
    *,
    kind: str | None = None,
    sources: str | None = None,
    num_sources: int = 4,
    at: str | None = None,
    targets: str | None = None,
    frames: int = 12,
    filters: Annotated[FilterConfig, tyro.conf.arg(name="")] = FilterConfig(),  # noqa: B008
    normals: bool = False,
    voxel: float | None = None,
    mesh: Annotated[MeshConfig, tyro.conf.arg(name="")] = MeshConfig(),  # noqa: B008
    depth_format: str | None = None,
    filter_depth: bool = False,
    size: str | None = None,
    weights: str = "default",
    quality: str = "full",
    device: str = "auto",
    scan: str | None = None,
    light: int = 3,
) -> None:
    """Write geometry: a coloured point cloud, a mesh, depth maps, or a data set of rendered views.

    Depth is rendered at several cameras, checked between them, and fused.

    Args:
        scene: folder of posed photos; its format is recognised (LLFF, transforms.json, Blender, COLMAP, DTU). A folder
            of photos without poses is posed first (see `idnerf poses`), and the result kept in it as `.idnerf`.
        out: .ply (point cloud; mesh with --kind mesh), .glb (mesh), .npy, .png or .exr (depth maps), or a new folder
            (data set: images, transforms.json, COLMAP model, points).
        kind: cloud, mesh, depth or dataset, where the ending of --out leaves a choice.
        sources: numbers of the photos to use, such as 0,3,7. Default: all of the scene.
        num_sources: how many of them, the nearest, each depth map is rendered from.
        at: cameras of the depth maps: sources (those of the photos used), or a path: interpolate, spiral, orbit.
            Default: sources; spiral for a data set.
        targets: cameras of these views instead, such as 12,13.
        frames: number of cameras of the path; of the photos at most so many, in pairs spread over the scene.
        filters: which depths are believed.
        normals: write normals with the point cloud.
        voxel: keep one point per cube of this edge (scene units).
        mesh: how a surface is made.
        depth_format: npy, png or exr: write depth maps into the data set too.
        filter_depth: depth maps keep only what the point cloud would, and 0 elsewhere.
        size: size to render at, such as 480x320. Default: the photos' own, at most 960 on the longer side.
        weights: `default`, a file, a run folder or a hub id.
        quality: full, or fast (fewer depth planes and samples).
        device: auto, cpu or cuda.
        scan: which scan of a DTU root.
        light: which light of DTU, 0 to 6.
    """
    check_quality(quality)
    check_num_sources(num_sources)
    chosen_kind = choose_kind(out, kind)
    check_options(at, targets, frames, voxel, depth_format)
    check_options_of_kind(chosen_kind, mesh, normals, voxel, depth_format, filter_depth)
    check_writable(out, folder=chosen_kind == "dataset")
    if chosen_kind == "dataset":
        check_new_folder(out)
    if chosen_kind == "mesh":
        require_scikit_image()
    wanted_size = parse_size(size)
    where = choose_device(device)
    loaded = load_scene(posed(scene), scan=scan, light=light)
    loaded = loaded.resized(wanted_size or working_size(loaded))
    wanted = parse_views(sources, "--sources")
    used = list(range(len(loaded))) if wanted is None else [loaded.index_of(i) for i in dict.fromkeys(wanted)]
    if len(used) < 2:
        raise InputError(f"expected at least 2 different views in --sources, got {sources}")
    place = at or ("spiral" if chosen_kind == "dataset" else "sources")
    cameras, names = target_cameras(loaded, used, place, parse_views(targets, "--targets"), frames)

    start = time.perf_counter()
    count = min(num_sources, len(used))
    views = render_views(loaded, used, cameras, count, weights, quality, where)
    rendered = time.perf_counter() - start
    what = write(out, chosen_kind, views, names, filters, mesh, normals, voxel, depth_format, filter_depth)
    print(
        f"{out}: {what}, from {len(views)} depth map{'s' if len(views) > 1 else ''} of {loaded.name} "
        f"({loaded.format}) at {cameras.width}x{cameras.height}, {count} photos each; rendering {rendered:.1f} s, "
        f"the rest {time.perf_counter() - start - rendered:.1f} s"
    )


def choose_kind(out: Path, kind: str | None) -> str:
    """What to write, by --kind and the ending of --out."""
    if kind is not None and kind not in KINDS:
        raise InputError(f"expected --kind {', '.join(KINDS)}; got {kind!r}")
    suffix = out.suffix.lower()
    fitting = [name for name, suffixes in KINDS.items() if suffix in suffixes]
    if not fitting:
        raise InputError(
            f"expected --out ending in .ply, .glb, .npy, .png or .exr, or a folder without ending; got {out.name!r}"
        )
    if kind is None:
        return fitting[0]
    if kind not in fitting:
        endings = " or ".join(s or "a folder without ending" for s in KINDS[kind])
        raise InputError(f"--kind {kind} is written as {endings}; got --out {out.name}")
    return kind


def check_options(
    at: str | None, targets: str | None, frames: int, voxel: float | None, depth_format: str | None
) -> None:
    """Flags that do not fit together or their own range."""
    if at is not None and at not in PLACES:
        raise InputError(f"expected --at {', '.join(PLACES)}; got {at!r}")
    if at is not None and targets is not None:
        raise InputError("expected --at or --targets, not both: each names the cameras of the depth maps")
    check_frames(frames)
    if voxel is not None and not voxel > 0:
        raise InputError(f"expected --voxel above 0, got {voxel}")
    if depth_format is not None and f".{depth_format}" not in DEPTH_SUFFIXES:
        raise InputError(f"expected --depth-format npy, png or exr; got {depth_format!r}")


def check_options_of_kind(
    kind: str, mesh: MeshConfig, normals: bool, voxel: float | None, depth_format: str | None, filter_depth: bool
) -> None:
    """Flags that do not fit what is written, and would be ignored."""
    if depth_format is not None and kind != "dataset":
        raise InputError("--depth-format is for a data set; for depth maps alone give --out ending in .npy, .png, .exr")
    if normals and kind != "cloud":
        raise InputError("--normals is for a point cloud; give --out ending in .ply, and no other --kind")
    if voxel is not None and kind not in ("cloud", "dataset"):
        raise InputError("--voxel is for the points of a cloud or data set; give --out ending in .ply, or a folder")
    if filter_depth and kind == "mesh":
        raise InputError("--filter-depth is not for a mesh, which is always made of filtered depth; leave it out")
    changed = [field.name for field in fields(mesh) if getattr(mesh, field.name) != field.default]
    if changed and kind != "mesh":
        flag = changed[0].replace("_", "-")
        raise InputError(f"--{flag} is for a mesh; give --out ending in .glb, or in .ply with --kind mesh")


def target_cameras(
    scene: Scene, used: list[int], place: str, targets: tuple[int, ...] | None, frames: int
) -> tuple[Cameras, list[int]]:
    """Cameras to render depth at, and their numbers: view numbers of the scene, or 0, 1, ... along a path."""
    if targets is not None:
        if not targets:
            raise InputError("expected --targets as view numbers such as 12,13; got none")
        different = list(dict.fromkeys(targets))  # one camera twice would confirm its own depth
        return scene.cameras[[scene.index_of(i) for i in different]], different
    photos = scene.cameras[used]
    if place == "sources":
        kept = [used[i] for i in spread_pairs(photos, frames)]
        return scene.cameras[kept], [scene.view_ids[i] for i in kept]
    return camera_path(place, photos, frames), list(range(frames))


def render_views(
    scene: Scene, used: list[int], cameras: Cameras, num_sources: int, weights: str, quality: str, device: torch.device
) -> DepthViews:
    """Depth maps at the cameras from the photos used."""
    # photos that no camera is near to are not even decoded
    photos = scene.cameras[used]
    near = {i for k in range(len(cameras)) for i in nearest_sources(photos, cameras[k], num_sources)}
    photos = scene.views([used[i] for i in sorted(near)])
    model: Any = load_model(weights, device)

    def render(source: Views, target: Cameras) -> Any:
        return model.render(source.to(device), target.to(device), quality=quality)

    with torch.inference_mode(), progress_bar("rendering depth") as update:
        return render_depth_views(render, photos, cameras, num_sources, progress=update)


def write(
    out: Path,
    kind: str,
    views: DepthViews,
    names: list[int],
    filters: FilterConfig,
    mesh: MeshConfig,
    normals: bool,
    voxel: float | None,
    depth_format: str | None,
    filter_depth: bool,
) -> str:
    """Write the chosen kind; returns what was written, in words."""
    if kind == "mesh":
        with progress_bar("fusing") as update:
            surface = fuse_mesh(views, filters, mesh, update)
        if out.suffix.lower() == ".glb":
            write_glb(out, surface, upright(views.cameras))
        else:
            write_ply(out, surface.points, surface.colors, faces=surface.faces)
        return f"mesh of {len(surface.points):,} vertices and {len(surface.faces):,} triangles"
    if filter_depth:
        with progress_bar("comparing depth maps") as update:
            views = replace(views, depth=filtered_depth(views, filters, update))
        if not (views.depth > 0).any():
            raise InputError("no depth is left: lower --min-confidence or --min-views, or raise --depth-tolerance")
    if kind == "depth":
        return write_depth_maps(out, views, names)
    cloud = fused(views, filters, voxel)
    if kind == "dataset":
        scale = write_dataset(out, views, cloud, None if depth_format is None else f".{depth_format}")
        flag = "" if scale in (None, NERFSTUDIO_SCALE) else f" (nerfstudio: --depth-unit-scale-factor {scale:g})"
        return f"data set of {len(views)} views and {len(cloud):,} points{flag}"
    write_ply(out, cloud.points, cloud.colors, cloud.normals if normals else None)
    return f"{len(cloud):,} points"


def fused(views: DepthViews, filters: FilterConfig, voxel: float | None) -> PointCloud:
    """The point cloud; bad input when nothing is left of it."""
    with progress_bar("joining depth maps") as update:
        cloud = fuse_points(views, filters, update)
    if len(cloud) == 0:
        raise InputError("no point is left: lower --min-confidence or --min-views, or raise --depth-tolerance")
    return cloud if voxel is None else voxel_downsample(cloud, voxel)


def write_depth_maps(out: Path, views: DepthViews, names: list[int]) -> str:
    """One camera: exactly ``out``; several: numbered files beside it. One scale for all 16-bit PNGs."""
    scale = depth_scale(float(views.depth.max()))
    for number, depth in zip(names, views.depth, strict=True):
        place = out if len(names) == 1 else out.with_name(f"{out.stem}_{number:04d}{out.suffix}")
        write_depth(place, depth, scale)
    steps = f", {scale:g} scene units a step" if out.suffix.lower() == ".png" else ""
    if len(names) == 1:
        return f"depth{steps}"
    return f"depth as {out.stem}_{names[0]:04d}{out.suffix} ...{steps}"
