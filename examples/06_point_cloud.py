"""6. A point cloud: depth maps at the photos' cameras, kept where they agree, fused, written as .ply."""

from pathlib import Path

import tyro

import idnerf
from idnerf.export.consistency import FilterConfig
from idnerf.export.depth_views import render_depth_views
from idnerf.export.ply import write_ply
from idnerf.export.point_cloud import fuse_points


def main(
    scene: Path | None = None,
    out: Path = Path("out/examples"),
    photos: int = 3,
    width: int = 320,
    min_confidence: float = 0.5,
) -> None:
    """Fuse the depth of a few photos into coloured points with normals.

    Args:
        scene: folder of posed photos; the bundled scene by default.
        out: folder for points.ply, which MeshLab, CloudCompare and Blender open.
        photos: how many, from the first.
        width: of the depth maps, in pixels.
        min_confidence: pixels below are left out.
    """
    loaded = idnerf.load_scene(scene or idnerf.demo_folder())
    loaded = loaded.resized((width, round(width * loaded.cameras.height / loaded.cameras.width)))
    model = idnerf.IDNeRF.from_pretrained()

    views = loaded.views(list(range(photos)))
    depth_views = render_depth_views(model.render, views, views.cameras, num_sources=photos)
    cloud = fuse_points(depth_views, FilterConfig(min_confidence=min_confidence, min_views=2))
    write_ply(out / "points.ply", cloud.points, cloud.colors, cloud.normals)
    pixels = photos * loaded.cameras.width * loaded.cameras.height
    print(f"{out / 'points.ply'}: {len(cloud):,} points of {pixels:,} pixels")


if __name__ == "__main__":
    tyro.cli(main)
