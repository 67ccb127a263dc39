"""2. Arrays in, arrays out: photos and cameras as NumPy arrays, for programs that have loaders of their own."""

from pathlib import Path

import numpy as np
import torch
import tyro

import idnerf
from idnerf.data.image_io import write_png


def main(scene: Path | None = None, out: Path = Path("out/examples"), width: int = 320) -> None:
    """Render a camera halfway between two photos.

    Args:
        scene: folder of posed photos, from which the arrays are made; the bundled scene by default.
        out: folder for between.png.
        width: of the pictures, in pixels.
    """
    images, K, c2w, near, far = photos_as_arrays(scene or idnerf.demo_folder(), width)

    halfway = c2w[0].copy()
    halfway[:3, 3] = (c2w[0, :3, 3] + c2w[1, :3, 3]) / 2  # turned like the first, between the first two
    output = idnerf.render(images, K, c2w, target_K=K[0], target_c2w=halfway, near=near, far=far)

    depth = output.depth.numpy()
    write_png(out / "between.png", output.rgb)
    print(f"{out / 'between.png'}: {images.shape[0]} photos in, median depth {np.median(depth):.3f} scene units")


def photos_as_arrays(folder: Path, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, float, float]:
    """Three photos as you may have them: 8-bit pixels [view, height, width, 3], K in pixels, OpenCV c2w."""
    scene = idnerf.load_scene(folder)
    scene = scene.resized((width, round(width * scene.cameras.height / scene.cameras.width)))
    views = scene.views([0, 1, 2])
    images = (views.images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    cameras = views.cameras
    return images, cameras.K.numpy(), cameras.c2w.numpy(), float(cameras.near.min()), float(cameras.far.max())


if __name__ == "__main__":
    tyro.cli(main)
