"""Seconds and peak memory of one view with the default weights: encode once, then render, both qualities.

python benchmarks/render_speed.py --sizes 320x240 640x512 1920x1080
"""

import resource
import time
from statistics import median
from typing import Any

import torch
import tyro

from idnerf.allocator import keep_freed_memory
from idnerf.commands.options import choose_device, load_model, parse_size
from idnerf.models.cascade import Quality
from idnerf.models.idnerf import IDNeRF
from idnerf.rendering.frames import MOST_FRAMES, made_at_once
from idnerf.types import Cameras, Views

QUALITIES: tuple[Quality, ...] = ("full", "fast")


def cameras(count: int, size: tuple[int, int]) -> Cameras:
    """Cameras in a row, 0.1 near apart, looking the same way."""
    c2w = torch.eye(4).repeat(count, 1, 1)
    c2w[:, 0, 3] = torch.arange(count) * 0.1
    K = torch.tensor([[size[0], 0, size[0] / 2], [0, size[0], size[1] / 2], [0, 0, 1.0]]).repeat(count, 1, 1)
    return Cameras(c2w, K, size, torch.full((count,), 1.0), torch.full((count,), 6.0))


def seconds_a_frame(model: IDNeRF, features: Any, target: Cameras, quality: Quality, frames: int = 8) -> float:
    """Of a video: frames at once, the first few, while threads start, not counted."""

    def make(_: int) -> float:
        with torch.inference_mode():
            model.render_target(features, target, quality=quality, fit_range=False)  # the path's
        if target.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    ends = list(made_at_once(MOST_FRAMES + frames, make, target.device))
    return (max(ends) - max(ends[:MOST_FRAMES])) / frames


def peak_gigabytes(device: torch.device) -> float:
    """Of this process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main(
    sizes: tuple[str, ...] = ("480x320", "640x512"),
    num_sources: int = 3,
    repeat: int = 3,
    device: str = "auto",
    weights: str = "default",
) -> None:
    """Print a table: size, seconds to encode, to render one view (full, fast), for a frame of several that are rendered
    at once as in a video (full, fast); peak memory in GB, of one view and of the video. Give sizes from small to
    large: peaks are of everything so far.
    """
    keep_freed_memory()
    where = choose_device(device)
    model = load_model(weights, where)

    def timed(function):
        times, result = [], None
        for _ in range(repeat):
            if where.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            result = function()
            if where.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return median(times), result

    print("| size | encode s | full s | fast s | full, video s | fast, video s | peak GB | peak GB, video |")
    print("|---" * 8 + "|")
    for text in sizes:
        size = parse_size(text)
        assert size is not None
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(num_sources, 3, size[1], size[0], generator=generator)
        all_cameras = cameras(num_sources + 1, size)
        source = Views(images, all_cameras[1:]).to(where)[None]
        target = all_cameras[:1].to(where)
        with torch.inference_mode():
            encode, features = timed(lambda source=source: model.encode(source))
            seconds = [
                timed(lambda f=features, t=target, q=quality: model.render_target(f, t, quality=q))[0]
                for quality in QUALITIES
            ]
            peaks = [peak_gigabytes(where)]
            seconds += [seconds_a_frame(model, features, target, quality) for quality in QUALITIES]
        peaks.append(peak_gigabytes(where))
        numbers = [f"{s:.2f}" for s in (encode, *seconds)] + [f"{peak:.1f}" for peak in peaks]
        print(f"| {text} | " + " | ".join(numbers) + " |", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
