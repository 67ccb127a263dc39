"""How accurate and how complete exported geometry is, on held-out procedural scenes whose surfaces are known exactly.

python benchmarks/geometry_accuracy.py --scenes 6 --size 256 192

Distances are shares (%) of the scene's median depth. Accuracy: from each exported point to the nearest exact surface
point. Completeness: from each exact surface point that at least two photos see to the nearest exported point. Exact
surface points are the pixels of all photos: what lies between them, the grain, is printed with the table.
"""

import statistics
from dataclasses import dataclass, replace

import torch
import tyro
from jaxtyping import Float
from scipy.spatial import cKDTree
from torch import Tensor

from idnerf.commands.options import choose_device, load_model
from idnerf.data.procedural.config import ProceduralConfig, ProceduralScene
from idnerf.data.procedural.generate import generate_scene
from idnerf.data.seen import count_seen
from idnerf.errors import InputError
from idnerf.export.consistency import FilterConfig
from idnerf.export.depth_views import DepthViews, render_depth_views
from idnerf.export.mesh import MeshConfig, fuse_mesh
from idnerf.export.point_cloud import fuse_points
from idnerf.geometry.rays import unproject
from idnerf.training.procedural_scenes import HELD_OUT_SEED
from idnerf.types import Views, stack_cameras

FIRST_SEED = HELD_OUT_SEED + 500_000
DEFAULT = FilterConfig()
FILTERS = {
    "no filter": replace(DEFAULT, min_confidence=0.0, min_views=1),
    "default": DEFAULT,
    "confidence 0.9": replace(DEFAULT, min_confidence=0.9),
    "3 views": replace(DEFAULT, min_views=3),
    "depth tolerance 0.01": replace(DEFAULT, depth_tolerance=0.01),
    "depth tolerance 0.05": replace(DEFAULT, depth_tolerance=0.05),
}


@dataclass(frozen=True)
class Truth:
    """Exact surface points: all, and those that at least two photos see; ``scale`` is the median depth."""

    all: Float[Tensor, "point 3"]
    seen_by_two: Float[Tensor, "point 3"]
    scale: float


def exact_surface(scene: ProceduralScene) -> Truth:
    """Surface points of every pixel of every photo."""
    cameras, depth = scene.views.cameras, scene.depth
    points = unproject(cameras, depth)
    seen = torch.stack([count_seen(cameras, depth, cameras[i], depth[i]) for i in range(len(cameras))])
    return Truth(points[depth > 0], points[seen >= 2], float(depth[depth > 0].median()))


def score(points: Float[Tensor, "point 3"], truth: Truth) -> dict[str, float]:
    """Distances both ways in % of the scale, shares within 0.5, 1 and 2 %, and the F-score at 1 %."""
    exact = cKDTree(truth.all.numpy())
    to_surface = torch.from_numpy(exact.query(points.numpy())[0]) / truth.scale * 100
    to_points = torch.from_numpy(cKDTree(points.numpy()).query(truth.seen_by_two.numpy())[0]) / truth.scale * 100
    values = {"points": float(len(points))}
    if len(points) == 0:
        return values
    for name, distances in (("accuracy", to_surface), ("completeness", to_points)):
        values[f"{name}_median"] = distances.median().item()
        for threshold in (0.5, 1.0, 2.0):
            values[f"{name}_{threshold:g}"] = (distances < threshold).double().mean().item()
    precision, recall = values["accuracy_1"], values["completeness_1"]
    values["f_1"] = 2 * precision * recall / max(precision + recall, 1e-9)
    return values


def leave_own_out(render, scene: ProceduralScene, num_sources: int) -> DepthViews:
    """Depth maps at the photos' cameras, each from its nearest other photos."""
    parts = []
    for i in range(len(scene.views)):
        others = scene.views[[j for j in range(len(scene.views)) if j != i]]
        part = render_depth_views(render, others, scene.views.cameras[i : i + 1], num_sources)
        parts.append(replace(part, images=scene.views.images[i : i + 1]))
    return DepthViews(
        *(torch.cat([getattr(p, name) for p in parts]) for name in ("images", "depth", "confidence")),
        stack_cameras([p.cameras[0] for p in parts]),
    )


def main(
    scenes: int = 6,
    size: tuple[int, int] = (256, 192),
    num_views: int = 6,
    num_sources: int = 4,
    complexity: tuple[float, float] = (0.2, 0.8),
    resolution: int = 160,
    weights: str = "default",
    device: str = "auto",
) -> None:
    """Print a table: one row per filter, then the mesh, then depth maps that leave their own photo out.

    Args:
        scenes: held-out scenes, mean over them.
        size: width, height of the photos.
        num_views: photos per scene, all of them used.
        num_sources: photos per depth map.
        complexity: range of the scenes' complexity.
        resolution: of the mesh's volume.
        weights: default, a file, a run folder or a hub id.
        device: auto, cpu or cuda.
    """
    where = choose_device(device)
    model = load_model(weights, where)

    def render(source: Views, target):
        return model.render(source.to(where), target.to(where))

    rows: dict[str, list[dict[str, float]]] = {}
    grain = []
    for number in range(scenes):
        scene = generate_scene(
            FIRST_SEED + number, ProceduralConfig(size=size, num_views=num_views, complexity=complexity)
        )
        truth = exact_surface(scene)
        others = torch.from_numpy(cKDTree(truth.all[::2].numpy()).query(truth.all[1::2].numpy())[0])
        grain.append(float(others.median()) / truth.scale * 100)
        with torch.inference_mode():
            views = render_depth_views(render, scene.views, scene.views.cameras, num_sources)
            without = leave_own_out(render, scene, num_sources - 1)
        for name, filters in FILTERS.items():
            rows.setdefault(name, []).append(score(fuse_points(views, filters).points, truth))
        try:
            mesh = fuse_mesh(views, DEFAULT, MeshConfig(resolution=resolution))
            rows.setdefault(f"mesh, resolution {resolution} (vertices)", []).append(score(mesh.points, truth))
        except InputError as error:
            print(f"scene {number}: no mesh ({error})", flush=True)
        for name in ("no filter", "default"):
            cloud = fuse_points(without, FILTERS[name])
            rows.setdefault(f"own photo left out, {name}", []).append(score(cloud.points, truth))
        exact = DepthViews(scene.views.images, scene.depth, torch.ones_like(scene.depth), scene.views.cameras)
        rows.setdefault("exact depth, default", []).append(score(fuse_points(exact, DEFAULT).points, truth))
        print(f"scene {number + 1} of {scenes}: {scene.name}", flush=True)

    print(f"\nhalf the exact points lie within {statistics.mean(grain):.2f} % of another one\n")
    thresholds = "median % | < 0.5 % | < 1 % | < 2 %"
    print(f"| depth maps | points | accuracy: {thresholds} | completeness: {thresholds} | F at 1 % |")
    print("|---" * 11 + "|")
    for name, values in rows.items():
        if not all(v["points"] for v in values):
            print(f"| {name} | no point in {sum(not v['points'] for v in values)} of {len(values)} scenes |")
            continue
        mean = {key: statistics.mean(v[key] for v in values) for key in values[0]}
        keys = [f"{way}_{t}" for way in ("accuracy", "completeness") for t in ("median", "0.5", "1", "2")]
        print(f"| {name} | {mean['points']:,.0f} | " + " | ".join(f"{mean[key]:.2f}" for key in [*keys, "f_1"]) + " |")


if __name__ == "__main__":
    tyro.cli(main)
