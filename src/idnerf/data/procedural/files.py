"""Procedural scenes as folders that other programs read too: PNGs, ``transforms.json``, depth as .npy."""

import json
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from idnerf.data.procedural.config import ProceduralScene
from idnerf.errors import InputError

OPENCV_TO_OPENGL = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0]))


def save_scene(scene: ProceduralScene, folder: Path) -> None:
    """Write ``images/*.png``, ``depth/*.npy`` (float32 z) and ``transforms.json``.

    The layout is nerfstudio's, with OpenGL axes.

    Each frame has its own intrinsics, ``near``, ``far`` and ``depth_file_path``. The folder appears complete
    or not at all.

    Raises:
        InputError: the folder exists and is not empty.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: expected a new or empty folder, found files in it; choose another one")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        staging = Path(temporary) / "scene"
        (staging / "images").mkdir(parents=True)
        (staging / "depth").mkdir()
        frames = [save_frame(scene, i, staging) for i in range(len(scene.views))]
        contents = {"camera_model": "OPENCV", "idnerf_procedural": True, "name": scene.name, "frames": frames}
        (staging / "transforms.json").write_text(json.dumps(contents, indent=1))
        if folder.exists():
            folder.rmdir()
        os.rename(staging, folder)


def save_frame(scene: ProceduralScene, index: int, folder: Path) -> dict[str, object]:
    """Write one view's image and depth; its entry of ``transforms.json``."""
    camera = scene.views.cameras[index]
    image = (scene.views.images[index].clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    Image.fromarray(image).save(folder / "images" / f"{index:03d}.png")
    np.save(folder / "depth" / f"{index:03d}.npy", scene.depth[index].cpu().numpy().astype(np.float32))
    K = camera.K.cpu()
    return {
        "file_path": f"images/{index:03d}.png",
        "depth_file_path": f"depth/{index:03d}.npy",
        "w": camera.width,
        "h": camera.height,
        "fl_x": float(K[0, 0]),
        "fl_y": float(K[1, 1]),
        "cx": float(K[0, 2]),
        "cy": float(K[1, 2]),
        "near": float(camera.near),
        "far": float(camera.far),
        "transform_matrix": (camera.c2w.cpu() @ OPENCV_TO_OPENGL).tolist(),
    }
