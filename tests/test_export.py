"""Export: exact surfaces come back exactly, doubtful depth does not come back at all, other programs read the files."""

import json
import math
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from command_line import run
from idnerf import load_scene
from idnerf.data.procedural.config import ProceduralConfig
from idnerf.data.procedural.files import save_scene
from idnerf.data.procedural.generate import generate_scene
from idnerf.errors import InputError
from idnerf.export.consistency import FilterConfig, agreement, filtered_depth
from idnerf.export.dataset import write_dataset
from idnerf.export.depth_files import SCALE_KEY, depth_scale, write_depth
from idnerf.export.depth_views import DepthViews, nearest_sources, own_photo, render_depth_views, spread_pairs
from idnerf.export.exr import write_exr
from idnerf.export.gltf import linear_light, upright, write_glb
from idnerf.export.grid import Grid, fit_grid
from idnerf.export.mesh import Mesh, MeshConfig, connected_parts, drop_small_parts, fuse_mesh
from idnerf.export.ply import write_ply
from idnerf.export.point_cloud import PointCloud, fuse_points, voxel_downsample
from idnerf.export.tsdf import fuse_tsdf
from idnerf.geometry.projection import project
from idnerf.geometry.quaternions import quaternion_of
from idnerf.geometry.rays import image_rays
from idnerf.geometry.trajectories import look_at
from idnerf.types import Cameras, RenderOutput, Views
from tiny_cases import cameras_on_a_wall, photograph_plane

PLANE = 4.0
BELIEVE_ALL = FilterConfig(min_confidence=0.0, min_views=1)


def plane_views(count: int = 4, size: tuple[int, int] = (64, 48)) -> DepthViews:
    """Exact depth of the plane z = 4 from cameras on a wall."""
    generator = torch.Generator().manual_seed(3)
    views, depth = photograph_plane(cameras_on_a_wall(count, size, generator), generator, depth=PLANE)
    return DepthViews(views.images, depth, torch.ones_like(depth), views.cameras)


def cameras_around(count: int, distance: float, size: tuple[int, int] = (64, 64)) -> Cameras:
    """Cameras on a sphere (a golden spiral) that look at its centre."""
    i = torch.arange(count) + 0.5
    polar, turn = torch.arccos(1 - 2 * i / count), math.pi * (1 + 5**0.5) * i
    away = torch.stack([torch.sin(polar) * torch.cos(turn), torch.sin(polar) * torch.sin(turn), torch.cos(polar)], -1)
    c2w = torch.eye(4).repeat(count, 1, 1)
    c2w[:, :3, :3] = look_at(away * distance, torch.zeros(3), torch.tensor([0.3, 0.9, 0.1]))
    c2w[:, :3, 3] = away * distance
    focal = 1.2 * size[0]
    K = torch.tensor([[focal, 0, size[0] / 2], [0, focal, size[1] / 2], [0, 0, 1]]).repeat(count, 1, 1)
    return Cameras(c2w, K, size, torch.full((count,), 0.5 * distance), torch.full((count,), 2 * distance))


def ball_views(radius: float = 1.0, count: int = 10) -> DepthViews:
    """Exact depth of a ball at the origin, coloured by its normal; 0 beside it."""
    cameras = cameras_around(count, 3 * radius)
    rays = image_rays(cameras)
    half = -(rays.origins * rays.directions).sum(-1)
    root = half.square() - rays.origins.square().sum(-1) + radius**2
    t = half - root.clamp_min(0).sqrt()
    depth = torch.where(root > 0, t * rays.cos, torch.zeros_like(t))
    points = rays.origins + rays.directions * t[..., None]
    images = (0.5 + 0.5 * F.normalize(points, dim=-1)).movedim(-1, 1)
    return DepthViews(images, depth, torch.ones_like(depth), cameras)


# --- depth maps at cameras ---------------------------------------------------------------------------------------


def test_sources_are_the_nearest_photos_and_a_photo_is_its_own_first():
    cameras = plane_views(5).cameras
    for i in range(5):
        chosen = nearest_sources(cameras, cameras[i], 3)
        distances = (cameras.centers - cameras.centers[i]).abs().sum(-1)
        assert chosen[0] == i == own_photo(cameras, cameras[i])
        assert distances[chosen].max() <= distances[[j for j in range(5) if j not in chosen]].min()
    moved = replace(cameras[0], K=cameras[0].K * torch.tensor([[2.0], [2.0], [1.0]]))
    assert own_photo(cameras, moved) is None
    for count in (1, 6):
        with pytest.raises(InputError, match="--num-sources from 2 to the 5"):
            nearest_sources(cameras, cameras[0], count)


def test_depth_at_a_photo_keeps_its_colours_and_elsewhere_takes_the_rendering():
    exact = plane_views(4)
    photos = Views(exact.images, exact.cameras)
    between = replace(exact.cameras[0], c2w=(exact.cameras.c2w[0] + exact.cameras.c2w[1]) / 2)
    targets = Cameras(
        torch.stack([exact.cameras.c2w[2], between.c2w]), exact.cameras.K[:2], exact.cameras.size,
        exact.cameras.near[:2], exact.cameras.far[:2],
    )  # fmt: skip
    asked = []

    def render(source: Views, target: Cameras) -> RenderOutput:
        asked.append((len(source), float(target.near)))
        flat = torch.full((48, 64), 3.0)
        return RenderOutput(torch.full((3, 48, 64), 0.25), flat, torch.ones_like(flat), None)

    views = render_depth_views(render, photos, targets, 3)
    assert asked == [(3, 2.0), (3, 2.0)] and len(views) == 2
    torch.testing.assert_close(views.images[0], photos.images[2])
    assert (views.images[1] == 0.25).all() and (views.confidence == 1).all()


def test_few_cameras_of_many_are_pairs_of_neighbours_spread_over_the_scene():
    cameras = cameras_on_a_wall(12, (16, 16), torch.Generator().manual_seed(0))
    c2w = cameras.c2w.clone()
    c2w[:, :3, 3] = torch.tensor([[i // 2 * 3.0 + i % 2, 0.0, 0.0] for i in range(12)])  # 0 1 .. 3 4 .. 6 7 ..
    row = replace(cameras, c2w=c2w)
    for count in (2, 4, 6, 11):
        chosen = spread_pairs(row, count)
        assert len(chosen) == count == len(set(chosen)) and chosen == sorted(chosen)
        if count % 2 == 0:
            assert all(b == a + 1 and a % 2 == 0 for a, b in zip(chosen[::2], chosen[1::2], strict=True))
    assert {0, 11} <= set(spread_pairs(row, 6)) and spread_pairs(row, 20) == list(range(12))


# --- consistency --------------------------------------------------------------------------------------------------


def test_exact_depths_agree_and_wrong_ones_do_not():
    views, config = plane_views(), FilterConfig(min_confidence=0.0)
    same = agreement(views.depth[0], views.cameras[0], views.depth[1], views.cameras[1], config)
    inside = (same.pixels > 1).all(-1) & (same.pixels < torch.tensor([63.0, 47.0])).all(-1)
    assert inside.float().mean() > 0.5 and same.agrees[inside].all()
    torch.testing.assert_close(same.depth[same.agrees], views.depth[0][same.agrees], rtol=1e-3, atol=1e-3)
    wrong = agreement(views.depth[0], views.cameras[0], views.depth[1] * 1.05, views.cameras[1], config)
    unknown = agreement(views.depth[0], views.cameras[0], views.depth[1] * 0, views.cameras[1], config)
    assert not wrong.agrees.any() and not unknown.agrees.any()


def test_depth_that_no_other_view_confirms_is_dropped():
    views = plane_views(3)
    depth = views.depth.clone()
    depth[0] *= 1.2
    kept = filtered_depth(replace(views, depth=depth), FilterConfig(min_confidence=0.0))
    assert (kept[0] == 0).all() and (kept[1:] > 0).float().mean() > 0.4
    known = kept > 0
    torch.testing.assert_close(kept[known], views.depth[known], rtol=1e-3, atol=1e-3)


def test_unsure_depth_is_dropped_and_asking_for_less_keeps_more():
    views = plane_views(3)
    confidence = torch.rand(views.depth.shape, generator=torch.Generator().manual_seed(0))
    unsure = replace(views, confidence=confidence)
    kept = filtered_depth(unsure, FilterConfig(min_confidence=0.7, min_views=1))
    assert ((kept > 0) == (confidence >= 0.7)).all()
    counts = [
        int((filtered_depth(views, FilterConfig(min_confidence=0.0, min_views=n)) > 0).sum()) for n in (1, 2, 3, 9)
    ]
    assert counts[0] == views.depth.numel() and counts[0] > counts[1] > counts[2] == counts[3] > 0


# --- point cloud --------------------------------------------------------------------------------------------------


def test_points_lie_on_the_plane_once_each_with_its_colours_and_normal():
    views = plane_views()
    cloud = fuse_points(views, FilterConfig(min_confidence=0.0))
    assert (cloud.points[:, 2] - PLANE).abs().max() < 1e-3
    assert (cloud.normals - torch.tensor([0.0, 0.0, -1.0])).abs().max() < 0.02
    # each surface point once: far fewer points than pixels, more than one view has
    assert views.depth[0].numel() < len(cloud) < 0.6 * views.depth.numel()
    pixels, _ = project(cloud.points, views.cameras[0])
    inside = ((pixels > 1) & (pixels < torch.tensor([63.0, 47.0]))).all(-1)
    columns, rows = pixels[inside].long().T
    assert (cloud.colors[inside] - views.images[0][:, rows, columns].T).abs().mean() < 0.02


def test_a_cloud_moves_with_the_world():
    views = plane_views(3)
    turn = cameras_around(1, 5.0).c2w[0]
    moved = replace(views, cameras=replace(views.cameras, c2w=turn @ views.cameras.c2w))
    here, there = (fuse_points(v, FilterConfig(min_confidence=0.0)) for v in (views, moved))
    assert abs(len(here) - len(there)) <= 0.01 * len(here)
    back = (there.points - turn[:3, 3]) @ turn[:3, :3]
    assert (back[:, 2] - PLANE).abs().max() < 2e-3
    torch.testing.assert_close(back.mean(0), here.points.mean(0), atol=0.02, rtol=0)


def test_normals_of_a_ball_point_outwards_right_up_to_its_edge():
    views = ball_views(count=2)
    cloud = fuse_points(views, BELIEVE_ALL)
    cosine = (cloud.normals * F.normalize(cloud.points, dim=-1)).sum(-1)
    assert cosine.median() > 0.999 and cosine.quantile(0.02) > 0.8
    torch.testing.assert_close(cloud.normals.norm(dim=-1), torch.ones(len(cloud)), atol=1e-4, rtol=0)


def test_voxels_are_the_means_of_a_naive_dictionary(generator):
    cloud = PointCloud(
        torch.randn(200, 3, generator=generator),
        torch.rand(200, 3, generator=generator),
        F.normalize(torch.randn(200, 3, generator=generator), dim=-1),
    )
    cells: dict[tuple[int, ...], list[int]] = {}
    for i, point in enumerate(cloud.points.tolist()):
        cells.setdefault(tuple(math.floor(x / 0.5) for x in point), []).append(i)
    ours = voxel_downsample(cloud, 0.5)
    expected = torch.stack([cloud.points[members].mean(0) for members in cells.values()])
    colors = torch.stack([cloud.colors[members].mean(0) for members in cells.values()])
    order, theirs = (sorted(range(len(x)), key=lambda i, x=x: x[i].tolist()) for x in (ours.points, expected))
    torch.testing.assert_close(ours.points[order], expected[theirs], atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.colors[order], colors[theirs], atol=1e-5, rtol=0)
    assert len(voxel_downsample(ours, 0.5)) == len(ours)
    for bad in (0.0, -1.0, 1e-9):
        with pytest.raises(InputError, match="--voxel"):
            voxel_downsample(cloud, bad)


# --- surface ------------------------------------------------------------------------------------------------------


def test_distances_in_front_of_one_camera_are_analytic():
    cameras = replace(cameras_around(1, 3.0), c2w=torch.eye(4)[None])
    depth = torch.full((1, 64, 64), 3.0)
    grid = Grid(torch.tensor([0.0, 0.0, 2.0]), 0.1, (1, 1, 21))
    distances, votes = fuse_tsdf(grid, depth, torch.full_like(depth, 0.7), cameras, 4.0)
    z = 2.0 + 0.1 * torch.arange(21)
    expected = ((3.0 - z) / 0.4).clamp_max(1)
    voted = (3.0 - z) / 0.4 > -1 + 1e-4
    torch.testing.assert_close(distances[0, 0, voted], expected[voted], atol=1e-5, rtol=0)
    torch.testing.assert_close(votes[0, 0], torch.where(voted, 0.7, 0.0), atol=1e-6, rtol=0)
    assert (distances[0, 0, ~voted] == 1).all()


def test_a_ball_comes_back_closed_and_outside_out():
    trimesh = pytest.importorskip("trimesh")
    views = ball_views()
    mesh = fuse_mesh(views, BELIEVE_ALL, MeshConfig(resolution=24))
    radius = mesh.points.norm(dim=-1)
    assert abs(float(radius.mean()) - 1) < 0.01 and (radius - 1).abs().max() < 0.05
    solid = trimesh.Trimesh(mesh.points.numpy(), mesh.faces.numpy(), process=False)
    assert solid.is_watertight and solid.is_winding_consistent
    assert solid.volume == pytest.approx(4 / 3 * math.pi, rel=0.05)
    expected = 0.5 + 0.5 * F.normalize(mesh.points, dim=-1)
    assert (mesh.colors - expected).abs().max() < 0.06


def test_a_frustum_serves_long_ranges_and_a_box_what_is_seen_from_around(generator):
    wall = cameras_on_a_wall(4, (64, 48), generator)
    z = torch.exp(torch.rand(5000, generator=generator) * 3)
    points = torch.stack([z * 0.4 * (torch.rand(5000, generator=generator) * 2 - 1), torch.zeros(5000), z], -1)
    long, short = fit_grid(points, wall, 24), fit_grid(points / points[:, 2:], wall, 24)
    around = fit_grid(points, cameras_around(8, 3.0), 24)
    assert long.camera is not None and short.camera is None and around.camera is None
    for grid in (long, around):
        corners = torch.rand(50, 3, generator=generator) * (torch.tensor(grid.shape) - 1)
        step = torch.tensor([0.0, 0.0, 1e-2])
        measured = (grid.world(corners + step) - grid.world(corners - step)).norm(dim=-1) / 2e-2
        slant = 1 if grid.camera is None else (grid.origin[:2] + corners[:, :2] * grid.cell).square().sum(-1).add(1)
        torch.testing.assert_close(measured, grid.edges(corners) * torch.as_tensor(slant) ** 0.5, rtol=2e-2, atol=1e-6)
    cells = math.prod(side - 9 for side in long.shape)
    assert 0.5 * 24**3 < cells < 2 * 24**3


def test_a_plane_in_a_frustum_is_a_plane():
    views = plane_views(3)
    depth = views.depth.clone()
    depth[:, :20] = views.depth[:, :20] * 0 + 20  # far things in the upper part make it a frustum
    mixed = replace(views, depth=depth)
    mesh = fuse_mesh(mixed, BELIEVE_ALL, MeshConfig(resolution=40, smallest_part=0.05))
    near = mesh.points[mesh.points[:, 2] < 6]
    assert len(near) > 200 and (near[:, 2] - PLANE).abs().median() < 0.02


def test_parts_are_the_connected_ones_and_small_ones_go():
    strip = torch.stack([torch.arange(0, 40), torch.arange(1, 41), torch.arange(2, 42)], -1)
    faces = torch.cat([strip, torch.tensor([[50, 51, 52], [52, 53, 50]])])[torch.randperm(42)]
    parts = connected_parts(faces, 60)
    assert (parts[:42] == 0).all() and (parts[50:54] == 50).all()
    assert torch.equal(parts[54:], torch.arange(54, 60)) and (parts[42:50] == torch.arange(42, 50)).all()
    assert len(drop_small_parts(faces, 60, 0.1)) == 40 and len(drop_small_parts(faces, 60, 0.0)) == 42


def test_no_depth_left_is_said():
    views = plane_views(2)
    nothing = replace(views, depth=torch.zeros_like(views.depth))
    assert len(fuse_points(nothing, BELIEVE_ALL)) == 0
    with pytest.raises(InputError, match="--min-confidence"):
        fuse_mesh(nothing, BELIEVE_ALL, MeshConfig(resolution=16))


# --- files --------------------------------------------------------------------------------------------------------


def small_mesh() -> Mesh:
    generator = torch.Generator().manual_seed(1)
    faces = torch.tensor([[0, 1, 2], [2, 1, 3], [3, 4, 0]])
    return Mesh(torch.randn(5, 3, generator=generator), torch.rand(5, 3, generator=generator), faces)


@pytest.mark.parametrize("normals", [False, True])
@pytest.mark.parametrize("triangles", [False, True])
def test_ply_is_what_plyfile_and_trimesh_read(tmp_path, normals, triangles):
    plyfile, trimesh = pytest.importorskip("plyfile"), pytest.importorskip("trimesh")
    mesh, path = small_mesh(), tmp_path / "a" / "mesh.ply"
    directions = F.normalize(mesh.points, dim=-1)
    write_ply(path, mesh.points, mesh.colors, directions if normals else None, mesh.faces if triangles else None)
    assert [p.name for p in path.parent.iterdir()] == ["mesh.ply"]
    data = plyfile.PlyData.read(str(path))
    vertex = data["vertex"]
    assert not data.text and data.byte_order == "<"
    names = ["x", "y", "z", *(["nx", "ny", "nz"] if normals else []), "red", "green", "blue"]
    assert [p.name for p in vertex.properties] == names
    assert {p.name: p.val_dtype for p in vertex.properties}["red"] == "u1"
    np.testing.assert_array_equal(np.stack([vertex[n] for n in "xyz"], -1), mesh.points.numpy())
    bytes_expected = (mesh.colors * 255).round().numpy()
    np.testing.assert_array_equal(np.stack([vertex[n] for n in ("red", "green", "blue")], -1), bytes_expected)
    loaded = trimesh.load(str(path), process=False)
    np.testing.assert_allclose(loaded.vertices, mesh.points.numpy(), atol=1e-6)
    if triangles:
        np.testing.assert_array_equal(loaded.faces, mesh.faces.numpy())
        np.testing.assert_array_equal(loaded.visual.vertex_colors[:, :3], bytes_expected)
    else:
        np.testing.assert_array_equal(loaded.colors[:, :3], bytes_expected)


def test_glb_is_what_trimesh_reads_with_colours_in_linear_light(tmp_path):
    trimesh = pytest.importorskip("trimesh")
    mesh, path = small_mesh(), tmp_path / "mesh.glb"
    write_glb(path, mesh)
    (loaded,) = trimesh.load(str(path), process=False).geometry.values()
    np.testing.assert_allclose(loaded.vertices, mesh.points.numpy(), atol=1e-6)
    np.testing.assert_array_equal(loaded.faces, mesh.faces.numpy())
    colours = np.asarray(loaded.visual.vertex_attributes["color"], dtype=np.float64)
    np.testing.assert_allclose(colours[:, :3], linear_light(mesh.colors).numpy() * 65535, atol=0.51)
    header = struct.unpack("<4sII", path.read_bytes()[:12])
    assert header == (b"glTF", 2, path.stat().st_size)


def test_linear_light_is_the_inverse_of_display_encoding():
    values = torch.linspace(0, 1, 101)
    linear = linear_light(values)
    encoded = torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear.clamp_min(1e-9) ** (1 / 2.4) - 0.055)
    torch.testing.assert_close(encoded, values, atol=1e-4, rtol=0)


def test_a_glb_stands_upright():
    cameras = plane_views(4).cameras
    turn = upright(cameras)
    torch.testing.assert_close(turn[:3, :3] @ turn[:3, :3].T, torch.eye(3), atol=1e-5, rtol=0)
    assert torch.linalg.det(turn[:3, :3]) > 0
    up, ahead = -cameras.c2w[:, :3, 1].mean(0), cameras.c2w[:, :3, 2].mean(0)
    assert (turn[:3, :3] @ up)[1] > 0.99 * up.norm() and (turn[:3, :3] @ ahead)[2] < -0.99 * ahead.norm()
    assert torch.isfinite(upright(cameras_around(20, 3.0))).all()


def read_exr(path: Path) -> tuple[dict[str, bytes], np.ndarray]:
    """A reader of its own, line by line from the specification: header attributes and the one channel's pixels."""
    data = path.read_bytes()
    assert struct.unpack_from("<ii", data) == (20000630, 2)
    place, attributes = 8, {}
    while data[place]:
        name, kind = data[place:].split(b"\0", 2)[:2]
        place += len(name) + len(kind) + 2
        (size,) = struct.unpack_from("<i", data, place)
        attributes[name.decode()] = data[place + 4 : place + 4 + size]
        place += 4 + size
    left, top, right, bottom = struct.unpack("<iiii", attributes["dataWindow"])
    rows = []
    for y, offset in enumerate(struct.unpack_from(f"<{bottom - top + 1}Q", data, place + 1)):
        assert struct.unpack_from("<ii", data, offset) == (top + y, 4 * (right - left + 1))
        rows.append(struct.unpack_from(f"<{right - left + 1}f", data, offset + 8))
    return attributes, np.array(rows, dtype=np.float32)


@pytest.mark.parametrize("size", [(1, 1), (7, 5)])
def test_exr_holds_every_bit_of_the_depth(tmp_path, generator, size):
    depth = torch.rand(size[1], size[0], generator=generator) * 1e3
    path = tmp_path / "depth.exr"
    write_exr(path, depth)
    attributes, values = read_exr(path)
    np.testing.assert_array_equal(values, depth.numpy())
    assert attributes["channels"].startswith(b"Z\0") and attributes["compression"] == b"\0"
    required = {"channels", "compression", "dataWindow", "displayWindow", "lineOrder", "pixelAspectRatio"}
    assert required | {"screenWindowCenter", "screenWindowWidth"} == set(attributes)


def test_exr_is_what_openexr_reads(tmp_path, generator):
    openexr = pytest.importorskip("OpenEXR")
    depth = torch.rand(5, 7, generator=generator)
    write_exr(tmp_path / "depth.exr", depth)
    with openexr.File(str(tmp_path / "depth.exr")) as file:
        np.testing.assert_array_equal(file.channels()["Z"].pixels, depth.numpy())


def test_sixteen_bits_and_their_scale_bring_depth_back(tmp_path, generator):
    depth = torch.rand(6, 8, generator=generator) * 130 + 1
    depth[0, 0] = 0
    scale = depth_scale(float(depth.max()))
    write_depth(tmp_path / "d.png", depth, scale)
    with Image.open(tmp_path / "d.png") as picture:
        assert picture.mode.startswith("I")
        read_scale = float(picture.text[SCALE_KEY])  # type: ignore[attr-defined]
        back = np.asarray(picture).astype(np.float64) * read_scale
    assert read_scale == scale and back[0, 0] == 0
    np.testing.assert_allclose(back, depth.numpy(), atol=0.5001 * scale)
    write_depth(tmp_path / "d.npy", depth, scale)
    np.testing.assert_array_equal(np.load(tmp_path / "d.npy"), depth.numpy())
    with pytest.raises(InputError, match=r"write .npy or .exr"):
        write_depth(tmp_path / "e.png", depth, scale / 10)
    with pytest.raises(InputError, match="ending in"):
        write_depth(tmp_path / "e.tif", depth, scale)
    assert not (tmp_path / "e.png").exists()


@pytest.mark.parametrize("far", [1e-4, 0.7, 6.0, 655.35, 12345.6])
def test_depth_scale_reaches_far_and_wastes_little(far):
    assert far <= depth_scale(far) * 65535 <= 1.12 * far


def test_quaternions_give_the_rotation_back(generator):
    for _ in range(20):
        rotation = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64)).Q
        rotation = rotation * torch.linalg.det(rotation)
        w, x, y, z = quaternion_of(rotation.numpy()).tolist()
        rebuilt = torch.tensor(
            [
                [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
                [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
                [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
            ],
            dtype=torch.float64,
        )
        assert w >= 0
        torch.testing.assert_close(rebuilt, rotation, atol=1e-9, rtol=0)


def test_a_data_set_is_read_back_from_either_description(tmp_path):
    views = plane_views(3)
    cloud = fuse_points(views, FilterConfig(min_confidence=0.0))
    folder = tmp_path / "set"
    write_dataset(folder, views, cloud, ".png")
    for description in ("transforms", "colmap"):
        if description == "colmap":
            (folder / "transforms.json").unlink()
        scene = load_scene(folder)
        assert scene.format == description and len(scene) == 3
        torch.testing.assert_close(scene.cameras.c2w, views.cameras.c2w, atol=1e-5, rtol=0)
        torch.testing.assert_close(scene.cameras.K, views.cameras.K, atol=1e-4, rtol=0)
        assert (scene.image(1) - views.images[1]).abs().max() < 0.51 / 255
        if description == "transforms":
            torch.testing.assert_close(scene.cameras.near, views.cameras.near)
    with pytest.raises(InputError, match="empty folder"):
        write_dataset(folder, views, cloud)


@pytest.mark.parametrize(
    ("size", "scale"), [(1.0, 1e-3), (12.0, 1e-3), (30.0, depth_scale(120.0)), (0.1, depth_scale(0.4))]
)
def test_depth_of_a_data_set_is_at_the_scale_that_nerfstudio_assumes_where_it_serves(tmp_path, size, scale):
    """It is an option of its command line (1e-3 unless given), and the JSON's own is not read."""
    wall = plane_views(3)
    views = replace(wall, depth=torch.full_like(wall.depth, 4 * size))
    cloud = PointCloud(torch.zeros(1, 3), torch.zeros(1, 3), torch.zeros(1, 3))
    assert write_dataset(tmp_path / "set", views, cloud, ".png") == scale
    content = json.loads((tmp_path / "set" / "transforms.json").read_text())
    assert content["depth_unit_scale_factor"] == scale
    with Image.open(tmp_path / "set" / content["frames"][0]["depth_file_path"]) as picture:
        np.testing.assert_allclose(np.asarray(picture) * scale, 4 * size, atol=0.51 * scale)
    assert write_dataset(tmp_path / "plain", views, cloud) is None


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "garden"
    config = ProceduralConfig(size=(64, 48), num_views=4, complexity=(0.1, 0.1), supersample=1)
    save_scene(generate_scene(5, config), folder)
    return folder


LOOSE = ["--min-confidence", 0, "--min-views", 1]


def test_a_target_named_twice_does_not_confirm_itself(capsys, scene, weights, tmp_path):
    clouds = []
    for targets in ("2,0", "2,0,2"):
        code, out, error = run(
            capsys, "export", scene, "--out", tmp_path / "a.ply", "--weights", weights, "--quality", "fast",
            "--min-confidence", 0, "--targets", targets, "--pixel-tolerance", 3, "--depth-tolerance", 1,
        )  # fmt: skip
        assert code == 0 and "from 2 depth maps" in out, error
        clouds.append((tmp_path / "a.ply").read_bytes())
    assert clouds[0] == clouds[1]


@pytest.mark.parametrize("far", [4.0, 400.0])
def test_another_scale_than_nerfstudio_assumes_is_printed(capsys, monkeypatch, scene, weights, tmp_path, far):
    def render(*_, **__) -> DepthViews:
        wall = plane_views(3)
        return replace(wall, depth=torch.full_like(wall.depth, far))

    monkeypatch.setattr("idnerf.commands.export.render_views", render)
    code, out, error = run(
        capsys, "export", scene, "--out", tmp_path / "set", "--weights", weights, *LOOSE, "--depth-format", "png"
    )
    assert code == 0, error
    assert ("--depth-unit-scale-factor 0.0062)" in out) == (far == 400.0)


def test_cloud_mesh_depth_and_data_set_on_the_command_line(capsys, scene, weights, tmp_path):
    common = ["--weights", weights, "--quality", "fast", *LOOSE]
    code, out, error = run(
        capsys, "export", scene, "--out", tmp_path / "cloud.ply", *common, "--normals", "--voxel", 0.05
    )
    assert code == 0 and "points, from 4 depth maps of garden" in out, error
    assert b"property float nx" in (tmp_path / "cloud.ply").read_bytes()[:400]
    for name, extra in (("mesh.glb", []), ("mesh.ply", ["--kind", "mesh"])):
        code, out, error = run(
            capsys, "export", scene, "--out", tmp_path / name, *common, *extra, "--frames", 2, "--resolution", 16,
            "--smallest-part", 0,
        )  # fmt: skip
        assert code == 0 and "mesh of" in out and "2 depth maps" in out, error
    code, out, error = run(capsys, "export", scene, "--out", tmp_path / "d" / "one.npy", *common, "--targets", 2)
    assert code == 0 and np.load(tmp_path / "d" / "one.npy").shape == (48, 64), error
    (tmp_path / "d" / "one.npy").rename(tmp_path / "one.npy")
    code, out, error = run(capsys, "export", scene, "--out", tmp_path / "d" / "one.NPY", *common, "--targets", 2)
    assert code == 0 and np.array_equal(np.load(tmp_path / "d" / "one.NPY"), np.load(tmp_path / "one.npy")), error
    (tmp_path / "d" / "one.NPY").rename(tmp_path / "d" / "one.npy")
    code, out, error = run(capsys, "export", scene, "--out", tmp_path / "d" / "many.exr", *common, "--sources", "1,3,0")
    assert code == 0, error
    names = sorted(p.name for p in (tmp_path / "d").iterdir())
    assert names == ["many_0000.exr", "many_0001.exr", "many_0003.exr", "one.npy"]
    code, out, error = run(
        capsys, "export", scene, "--out", tmp_path / "set", *common, "--at", "orbit", "--frames", 3, "--size", "32x24",
        "--depth-format", "npy",
    )  # fmt: skip
    assert code == 0 and "data set of 3 views" in out, error
    made = load_scene(tmp_path / "set")
    assert len(made) == 3 and made.cameras.size == (32, 24)
    frames = json.loads((tmp_path / "set" / "transforms.json").read_text())["frames"]
    depth = np.load(tmp_path / "set" / frames[2]["depth_file_path"])
    assert depth.shape == (24, 32) and (depth > 0).all()
    strict = ["--filter-depth", "--min-confidence", 1.0, "--targets", 2]
    code, out, error = run(
        capsys, "export", scene, "--out", tmp_path / "none.png", "--weights", weights, "--quality", "fast", *strict
    )
    assert code == 2 and "no depth is left" in error and not (tmp_path / "none.png").exists()
    assert not [p for p in tmp_path.rglob(".*")]
