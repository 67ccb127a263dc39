"""4. Video: photos are encoded once, every frame of a camera path is rendered from the same features."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor

import idnerf
from idnerf.geometry.trajectories import camera_path
from idnerf.rendering.colormap import colorize_depth
from idnerf.video import write_video


def main(
    scene: Path | None = None,
    out: Path = Path("out/examples"),
    path: Literal["interpolate", "spiral", "orbit"] = "orbit",
    frames: int = 8,
    width: int = 160,
) -> None:
    """Render a video, colour beside depth.

    Args:
        scene: folder of posed photos; the bundled scene by default.
        out: folder for orbit.mp4 (or spiral.mp4, ...).
        path: where the camera goes.
        frames: how many.
        width: of a frame, in pixels.
    """
    loaded = idnerf.load_scene(scene or idnerf.demo_folder())
    loaded = loaded.resized((width, round(width * loaded.cameras.height / loaded.cameras.width)))
    model = idnerf.IDNeRF.from_pretrained()
    sources = loaded.views([0, 1, 2])
    cameras = camera_path(path, sources.cameras, frames)
    near, far = float(cameras.near.min()), float(cameras.far.max())

    def pictures() -> Iterator[Tensor]:
        with torch.inference_mode():
            features = model.encode(sources[None])  # once; everything that does not depend on the target
            fitted = model.fit_path(features, cameras, quality="fast")  # one depth range for the whole path
            for number in range(frames):
                output = model.render_target(features, fitted[number][None], quality="fast", fit_range=False)
                yield torch.cat([output.rgb[0], colorize_depth(output.depth[0], near, far)], dim=-1)

    file = out / f"{path}.mp4"
    count = write_video(file, pictures(), fps=8.0)
    print(f"{file}: {count} frames")


if __name__ == "__main__":
    tyro.cli(main)
