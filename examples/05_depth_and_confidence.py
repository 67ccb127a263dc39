"""5. Depth and confidence: how far, and how sure. Leaving unsure pixels out leaves errors out."""

from pathlib import Path

import torch
import tyro

import idnerf
from idnerf.data.image_io import write_png
from idnerf.rendering.colormap import colorize, colorize_depth, colorize_error


def main(scene: Path | None = None, out: Path = Path("out/examples"), target: int = 0, width: int = 320) -> None:
    """Render a view with its depth and confidence, and see whether confidence knows where the errors are.

    Args:
        scene: folder of posed photos; the bundled scene by default.
        out: folder for depth_and_confidence.png.
        target: the view to render.
        width: of the pictures, in pixels.
    """
    loaded = idnerf.load_scene(scene or idnerf.demo_folder())
    loaded = loaded.resized((width, round(width * loaded.cameras.height / loaded.cameras.width)))
    model = idnerf.IDNeRF.from_pretrained()
    sources = loaded.nearest(loaded.cameras[target], n=min(3, len(loaded) - 1))
    near, far = loaded.target_bounds(sources.cameras)
    output = model.render(sources, loaded.cameras[target].with_bounds(near, far))
    assert output.confidence is not None  # the `paper` configuration has none

    truth = loaded.image(target)
    error = (output.rgb - truth).abs().mean(0)
    order = output.confidence.flatten().argsort(descending=True)
    for kept in (1.0, 0.9, 0.5):
        pixels = order[: int(kept * len(order))]
        print(f"the surest {kept:4.0%} of the pixels: mean error {float(error.flatten()[pixels].mean()):.4f}")

    pictures = [
        output.rgb,
        colorize_depth(output.depth, float(near), float(far)),  # near red, far blue
        colorize(output.confidence),  # sure red, unsure blue
        colorize_error(output.rgb, truth),
    ]
    write_png(out / "depth_and_confidence.png", torch.cat(pictures, dim=-1))
    print(f"{out / 'depth_and_confidence.png'}: colour, depth, confidence, error")


if __name__ == "__main__":
    tyro.cli(main)
