"""Exact synthetic scenes, written to disk in every format that ``idnerf.load_scene`` reads.

The scene is a slanted, smoothly textured plane, so the colour of a pixel and its depth have closed forms; a
lens is simulated by inverting its formula (written here scalar by scalar, apart from the package's). Each
writer starts from OpenCV cameras and converts to its format's own axes, units and files.
"""

import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

Lens = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]

PLANE_NORMAL = np.array([0.15, -0.1, 1.0])
PLANE_OFFSET = 4.0  # the plane is normal . x = offset


@dataclass(frozen=True)
class SyntheticScene:
    """Exact OpenCV cameras (float64) and their 8-bit photos, lens included."""

    c2w: np.ndarray
    K: np.ndarray
    size: tuple[int, int]
    images: list[np.ndarray]
    distort: Lens | None = None

    def __len__(self) -> int:
        return len(self.c2w)


def make_scene(
    *,
    views: int = 4,
    size: tuple[int, int] = (80, 64),
    focal: tuple[float, float] = (70.0, 74.0),
    center: tuple[float, float] | None = (41.5, 30.0),
    distort: Lens | None = None,
    spacing: float = 0.3,
) -> SyntheticScene:
    c2w = np.stack([_camera(i, views, spacing) for i in range(views)])
    cx, cy = center or (size[0] / 2, size[1] / 2)
    K = np.array([[focal[0], 0, cx], [0, focal[1], cy], [0, 0, 1.0]])
    images = [np.round(photo(pose, K, size, distort) * 255).astype(np.uint8) for pose in c2w]
    return SyntheticScene(c2w, K, size, images, distort)


def _camera(index: int, views: int, spacing: float) -> np.ndarray:
    """Cameras on a small arc with a different roll, pan and tilt each."""
    x = spacing * (index - (views - 1) / 2)
    c2w = np.eye(4)
    c2w[:3, :3] = _rotation(0.05 * math.sin(3 * index), -0.2 * x, 0.1 * math.cos(2 * index))
    c2w[:3, 3] = [x, 0.1 * math.sin(5 * index), 0.05 * index]
    return c2w


def _rotation(tilt: float, pan: float, roll: float) -> np.ndarray:
    def about(axis: int, angle: float) -> np.ndarray:
        matrix, (i, j) = np.eye(3), [k for k in range(3) if k != axis]
        matrix[i, i] = matrix[j, j] = math.cos(angle)
        matrix[i, j], matrix[j, i] = -math.sin(angle), math.sin(angle)
        return matrix

    return about(1, pan) @ about(0, tilt) @ about(2, roll)


def texture(points: np.ndarray) -> np.ndarray:
    """RGB in [0, 1] of points of the plane: smooth, distinct along both axes."""
    x, y = points[..., 0], points[..., 1]
    red = 0.5 + 0.25 * np.sin(7 * x + 1) + 0.2 * np.sin(11 * y + 2 * x)
    green = 0.5 + 0.25 * np.sin(9 * y) + 0.2 * np.cos(6 * x - 4 * y)
    blue = 0.5 + 0.45 * np.sin(5 * x + 6 * y)
    return np.stack([red, green, blue], -1)


def pixel_grid(size: tuple[int, int]) -> np.ndarray:
    u, v = np.meshgrid(np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5)
    return np.stack([u, v], -1)


def plane_depth(c2w: np.ndarray, normalised: np.ndarray) -> np.ndarray:
    """Depth z at which rays (x, y, 1) of a camera meet the plane."""
    directions = np.concatenate([normalised, np.ones_like(normalised[..., :1])], -1) @ c2w[:3, :3].T
    return (PLANE_OFFSET - PLANE_NORMAL @ c2w[:3, 3]) / (directions @ PLANE_NORMAL)


def photo(
    c2w: np.ndarray,
    K: np.ndarray,
    size: tuple[int, int],
    distort: Lens | None = None,
) -> np.ndarray:
    """What the camera sees, height x width x 3 in [0, 1]."""
    normalised = (pixel_grid(size) - K[:2, 2]) / [K[0, 0], K[1, 1]]
    if distort is not None:
        normalised = invert_lens(normalised, distort)
    points = np.concatenate([normalised, np.ones_like(normalised[..., :1])], -1)
    points = points * plane_depth(c2w, normalised)[..., None]
    return texture(points @ c2w[:3, :3].T + c2w[:3, 3])


def invert_lens(distorted: np.ndarray, distort: Lens) -> np.ndarray:
    """Fixed-point iteration x <- x + (wanted - distort(x)); converges for the mild lenses of the tests."""
    points = distorted.copy()
    for _ in range(60):
        points = points + distorted - np.stack(distort(points[..., 0], points[..., 1]), -1)
    return points


def perspective_lens(k1=0.0, k2=0.0, p1=0.0, p2=0.0):
    """Brown and Conrady as in OpenCV's documentation."""

    def distort(x, y):
        r2 = x**2 + y**2
        factor = 1 + k1 * r2 + k2 * r2**2
        return (
            x * factor + 2 * p1 * x * y + p2 * (r2 + 2 * x**2),
            y * factor + p1 * (r2 + 2 * y**2) + 2 * p2 * x * y,
        )

    return distort


def fisheye_lens(k1=0.0, k2=0.0, k3=0.0, k4=0.0):
    """Kannala and Brandt as in OpenCV's documentation."""

    def distort(x, y):
        r = np.sqrt(x**2 + y**2) + 1e-15
        theta = np.arctan(r)
        scale = theta * (1 + k1 * theta**2 + k2 * theta**4 + k3 * theta**6 + k4 * theta**8) / r
        return x * scale, y * scale

    return distort


def scene_points(count: int = 200, seed: int = 0) -> np.ndarray:
    """Points of the plane in front of every camera of ``make_scene``."""
    xy = np.random.default_rng(seed).uniform(-0.8, 0.8, (count, 2))
    z = (PLANE_OFFSET - xy @ PLANE_NORMAL[:2]) / PLANE_NORMAL[2]
    return np.concatenate([xy, z[:, None]], 1)


def project_exactly(points: np.ndarray, c2w: np.ndarray, K: np.ndarray) -> np.ndarray:
    """Pinhole pixels, in float64."""
    in_camera = (points - c2w[:3, 3]) @ c2w[:3, :3]
    pixels = in_camera @ K.T
    return pixels[:, :2] / pixels[:, 2:]


def save_images(scene: SyntheticScene, folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for image, name in zip(scene.images, names, strict=True):
        Image.fromarray(image).save(folder / name)


def write_llff(root: Path, scene: SyntheticScene, *, bounds=(2.0, 10.0), full_scale: int = 4) -> Path:
    """LLFF: columns down, right, back, centre, hwf; hwf for photos ``full_scale`` times as large."""
    save_images(scene, root / "images", [f"image{i:03d}.png" for i in range(len(scene))])
    rows = []
    for i, c2w in enumerate(scene.c2w):
        right, down, forward, center = c2w[:3].T
        hwf = np.array([scene.size[1], scene.size[0], scene.K[0, 0]]) * full_scale
        pose = np.stack([down, right, -forward, center, hwf], 1)
        rows.append([*pose.ravel(), bounds[0] + 0.1 * i, bounds[1] + i])
    np.save(root / "poses_bounds.npy", np.array(rows))
    return root


def _opengl(c2w: np.ndarray) -> list[list[float]]:
    return (c2w @ np.diag([1.0, -1.0, -1.0, 1.0])).tolist()


def write_transforms(root: Path, scene: SyntheticScene, *, per_frame: bool = False, **extra) -> Path:
    """nerfstudio: intrinsics at the top or in each frame; ``extra`` goes beside them (k1, camera_model, near
    ...)."""
    names = [f"images/frame_{i:05d}.png" for i in range(len(scene))]
    save_images(scene, root / "images", [Path(name).name for name in names])
    intrinsics = {
        "fl_x": scene.K[0, 0],
        "fl_y": scene.K[1, 1],
        "cx": scene.K[0, 2],
        "cy": scene.K[1, 2],
        "w": scene.size[0],
        "h": scene.size[1],
        **extra,
    }
    frames = [
        {"file_path": name, "transform_matrix": _opengl(c2w), **(intrinsics if per_frame else {})}
        for name, c2w in zip(names, scene.c2w, strict=True)
    ]
    (root / "transforms.json").write_text(json.dumps({**({} if per_frame else intrinsics), "frames": frames}))
    return root


def write_procedural(root: Path, scene: SyntheticScene) -> Path:
    """Our own: a transforms.json with near, far and exact depth per frame."""
    write_transforms(root, scene)
    content = json.loads((root / "transforms.json").read_text())
    content["idnerf_procedural"] = True
    (root / "depth").mkdir()
    for i, frame in enumerate(content["frames"]):
        normalised = (pixel_grid(scene.size) - scene.K[:2, 2]) / [scene.K[0, 0], scene.K[1, 1]]
        depth = plane_depth(scene.c2w[i], normalised)
        depth[0, 0] = 0  # unknown
        np.save(root / "depth" / f"{i}.npy", depth.astype(np.float32))
        frame.update(near=2.0 + 0.1 * i, far=8.0 + i, depth_file_path=f"depth/{i}.npy")
    (root / "transforms.json").write_text(json.dumps(content))
    return root


def write_blender(root: Path, scene: SyntheticScene) -> Path:
    """NeRF-Synthetic: camera_angle_x, file paths without extension, RGBA."""
    save_images(scene, root / "train", [f"r_{i}.png" for i in range(len(scene))])
    for i in range(len(scene)):
        Image.open(root / "train" / f"r_{i}.png").convert("RGBA").save(root / "train" / f"r_{i}.png")
    angle = 2 * math.atan(scene.size[0] / 2 / scene.K[0, 0])
    frames = [
        {"file_path": f"./train/r_{i}", "rotation": 0.01, "transform_matrix": _opengl(scene.c2w[i])}
        for i in range(len(scene))
    ]
    (root / "transforms_train.json").write_text(json.dumps({"camera_angle_x": angle, "frames": frames}))
    return root


COLMAP_IDS = {
    "SIMPLE_PINHOLE": 0,
    "PINHOLE": 1,
    "SIMPLE_RADIAL": 2,
    "RADIAL": 3,
    "OPENCV": 4,
    "OPENCV_FISHEYE": 5,
}


def write_colmap(
    root: Path,
    scene: SyntheticScene,
    model: str,
    lens: tuple[float, ...] = (),
    *,
    binary: bool,
    points: int = 300,
) -> Path:
    """COLMAP's output: ``points`` 3D points seen by every image (feature 0 of each image is unmatched, id
    -1)."""
    names = [f"p{i}.png" for i in range(len(scene))]
    save_images(scene, root / "images", names)
    fx, fy, (cx, cy) = scene.K[0, 0], scene.K[1, 1], scene.K[:2, 2]
    focal = (fx, fy) if model in ("PINHOLE", "OPENCV", "OPENCV_FISHEYE") else (fx,)
    parameters = (*focal, cx, cy, *lens)
    w2c = [np.linalg.inv(c2w) for c2w in scene.c2w]
    poses = [(*quaternion(matrix[:3, :3]), *matrix[:3, 3]) for matrix in w2c]
    xyz = scene_points(points)
    ids = [10 + 3 * i for i in range(points)]
    folder = root / "sparse" / "0"
    folder.mkdir(parents=True)
    # Images are listed in reverse: the reader sorts by name.
    order = list(reversed(range(len(scene))))
    if not binary:
        camera = " ".join(map(repr, map(float, parameters)))
        (folder / "cameras.txt").write_text(f"# cameras\n7 {model} {scene.size[0]} {scene.size[1]} {camera}\n")
        lines = ["# images"]
        for i in order:
            lines.append(f"{i + 1} {' '.join(map(repr, map(float, poses[i])))} 7 {names[i]}")
            lines.append(" ".join(["1.0 2.0 -1", *(f"3.0 4.0 {point}" for point in ids)]))
        (folder / "images.txt").write_text("\n".join(lines) + "\n")
        rows = [f"{n} {x} {y} {z} 9 9 9 0.5 1 0 2 1" for n, (x, y, z) in zip(ids, xyz.tolist(), strict=True)]
        (folder / "points3D.txt").write_text("\n".join(["# points", *rows]) + "\n")
        return root
    (folder / "cameras.bin").write_bytes(
        struct.pack("<Q", 1)
        + struct.pack("<iiQQ", 7, COLMAP_IDS[model], *scene.size)
        + struct.pack(f"<{len(parameters)}d", *parameters)
    )
    data = struct.pack("<Q", len(scene))
    for i in order:
        data += struct.pack("<I7dI", i + 1, *poses[i], 7) + names[i].encode() + b"\0"
        data += struct.pack("<Q", points + 1) + struct.pack("<ddq", 1.0, 2.0, -1)
        data += b"".join(struct.pack("<ddq", 3.0, 4.0, point) for point in ids)
    (folder / "images.bin").write_bytes(data)
    data = struct.pack("<Q", points)
    for n, point in zip(ids, xyz, strict=True):
        data += struct.pack("<Q3d3BdQ", n, *point, 9, 9, 9, 0.5, 2) + struct.pack("<4i", 1, 0, 2, 1)
    (folder / "points3D.bin").write_bytes(data)
    return root


def quaternion(rotation: np.ndarray) -> np.ndarray:
    """(w, x, y, z) of a rotation of less than 180 degrees."""
    w = math.sqrt(1 + np.trace(rotation)) / 2
    skew = rotation - rotation.T
    return np.array([w, skew[2, 1] / (4 * w), skew[0, 2] / (4 * w), skew[1, 0] / (4 * w)])


def write_dtu(
    root: Path,
    scene: SyntheticScene,
    *,
    scan: str = "scan24",
    light: int = 3,
    ids: tuple[int, ...] = (0, 2, 7, 11),
) -> Path:
    """DTU training layout: millimetres, w2c, K at a quarter of 640x512, picture numbers one above camera
    ids."""
    folder = root / "Rectified" / f"{scan}_train"
    save_images(scene, folder, [f"rect_{i + 1:03d}_{light}_r5000.png" for i in ids])
    cameras = root / "Cameras" / "train"
    cameras.mkdir(parents=True, exist_ok=True)
    to_quarter = np.diag([160 / scene.size[0], 128 / scene.size[1], 1])
    for camera, c2w in zip(ids, scene.c2w, strict=True):
        w2c = np.linalg.inv(c2w)
        w2c[:3, 3] *= 200
        rows = ["extrinsic", *(" ".join(map(repr, row)) for row in w2c.tolist()), "", "intrinsic"]
        rows += [*(" ".join(map(repr, row)) for row in (to_quarter @ scene.K).tolist()), "", "425.0 2.5"]
        (cameras / f"{camera:08d}_cam.txt").write_text("\n".join(rows) + "\n")
    return root


def write_pfm(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = f"Pf\n{values.shape[1]} {values.shape[0]}\n-1.0\n".encode()
    path.write_bytes(header + values[::-1].astype("<f4").tobytes())
