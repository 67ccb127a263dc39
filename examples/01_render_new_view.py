"""1. A new view: load posed photos, take the nearest ones as sources, render a camera that none of them is."""

from pathlib import Path

import torch
import tyro

import idnerf
from idnerf.data.image_io import write_png
from idnerf.evaluation.metrics import psnr


def main(scene: Path | None = None, out: Path = Path("out/examples"), target: int = 0, width: int = 320) -> None:
    """Render a view of a scene without its own photo, and put the photo beside it.

    Args:
        scene: folder of posed photos; the bundled scene by default.
        out: folder for new_view.png.
        target: the view to render.
        width: of the pictures, in pixels.
    """
    loaded = idnerf.load_scene(scene or idnerf.demo_folder())
    loaded = loaded.resized((width, round(width * loaded.cameras.height / loaded.cameras.width)))
    model = idnerf.IDNeRF.from_pretrained()

    camera = loaded.cameras[target]
    sources = loaded.nearest(camera, n=min(3, len(loaded) - 1))  # never the target's own photo
    near, far = loaded.target_bounds(sources.cameras)  # what the sources know of the depth range
    output = model.render(sources, camera.with_bounds(near, far))

    truth = loaded.image(target)
    write_png(out / "new_view.png", torch.cat([output.rgb, truth], dim=-1))
    print(f"{out / 'new_view.png'}: rendered and true; PSNR {psnr(output.rgb, truth):.2f} dB")


if __name__ == "__main__":
    tyro.cli(main)
