"""`idnerf demo`: the whole way from photos to a new view on a bundled scene, in under a minute, without a download."""

import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from idnerf.commands.options import check_frames, check_writable, choose_device, counted, load_model, progress_bar
from idnerf.data.image_io import write_png
from idnerf.data.load import demo_folder, load_scene
from idnerf.evaluation.evaluator import render_inputs
from idnerf.evaluation.metrics import psnr
from idnerf.evaluation.protocols import Task
from idnerf.evaluation.references import REFERENCES
from idnerf.geometry.trajectories import camera_path
from idnerf.rendering.colormap import colorize_depth, colorize_error
from idnerf.rendering.frames import made_at_once
from idnerf.video import write_video

TARGET = 0
"""View of the bundled scene that is rendered and compared; the others are its sources."""
NUM_SOURCES = 3


def demo(out: Path = Path("out/demo"), *, frames: int = 30, device: str = "auto", weights: str = "default") -> None:
    """Render a bundled scene with the default weights: a video, a depth map, a comparison with the truth.

    Args:
        out: folder for video.mp4, comparison.png and depth.png.
        frames: frames of the video.
        device: auto, cpu or cuda.
        weights: `default`, a file, a run folder or a hub id.
    """
    check_frames(frames)
    check_writable(out, folder=True)
    where = choose_device(device)
    scene = load_scene(demo_folder())
    sources = scene.nearest_indices(scene.cameras[TARGET], NUM_SOURCES)
    source, target = render_inputs(scene, Task(TARGET, tuple(sources)), where)
    truth = scene.image(TARGET)
    model = load_model(weights, where)
    with torch.inference_mode():
        start = time.perf_counter()
        output = model.render(source, target).map(lambda x: x.float().cpu())
        seconds = time.perf_counter() - start
        near, far = float(target.near), float(target.far)
        depth = colorize_depth(output.depth, near, far)
        print(f"view {TARGET} from views {', '.join(map(str, sources))}: PSNR {psnr(output.rgb, truth):.2f} dB", end="")
        rows = {name: psnr(render(source, target).rgb.cpu(), truth) for name, render in REFERENCES.items()}
        print(" (" + ", ".join(f"{name} {value:.2f}" for name, value in rows.items()) + f"), {seconds:.2f} s")

        write_png(out / "depth.png", depth)
        photos = {f"source {i}": image for i, image in zip(sources, source.images.cpu(), strict=True)}
        results = {"rendered": output.rgb, "truth": truth, "depth": depth, "error": colorize_error(output.rgb, truth)}
        write_png(out / "comparison.png", contact_sheet([photos, results]))

        features = model.encode(source[None])
        path = camera_path("spiral", source.cameras, frames)
        fitted = model.fit_path(features, path, quality="fast")
        with progress_bar("video") as update:

            def picture(number: int) -> Tensor:
                with torch.inference_mode():  # of this thread
                    latent = model.infer_latent(features, path[number][None])
                    frame = model.render_target(
                        features, fitted[number][None], quality="fast", latent=latent, fit_range=False
                    )
                    return torch.cat([frame.rgb[0].cpu(), colorize_depth(frame.depth[0].cpu(), near, far)], -1)

            pictures = made_at_once(frames, picture, where)
            write_video(out / "video.mp4", counted(pictures, frames, update), fps=15.0)
    print(f"{out}: comparison.png, depth.png, video.mp4 ({frames} frames, colour beside depth)")


def contact_sheet(rows: list[dict[str, Tensor]], gap: int = 6, caption: int = 16) -> Tensor:
    """Captioned pictures in rows, centred on white; all pictures of one size."""
    height, width = next(iter(rows[0].values())).shape[-2:]
    columns = max(len(row) for row in rows)
    size = (columns * (width + gap) + gap, len(rows) * (height + caption + gap) + gap)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for number, row in enumerate(rows):
        left = (size[0] - len(row) * (width + gap) + gap) // 2
        top = gap + number * (height + caption + gap)
        for name, picture in row.items():
            pixels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
            draw.text((left, top), name, fill="black")
            sheet.paste(Image.fromarray(pixels), (left, top + caption))
            left += width + gap
    return torch.from_numpy(np.asarray(sheet).copy()).permute(2, 0, 1) / 255
