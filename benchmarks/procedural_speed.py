"""Speed of the procedural scene generator: views per second on one core.

python benchmarks/procedural_speed.py [--scenes 10] [--device cpu]
"""

import statistics
import time
from typing import Literal

import torch
import tyro

from idnerf.data.procedural import ProceduralConfig, generate_scene


def seconds_per_scene(config: ProceduralConfig, scenes: int, device: str) -> list[float]:
    """Processor time of each scene on the CPU (undisturbed by other programs), wall time elsewhere."""
    generate_scene(0, config, device)
    clock = time.process_time if device == "cpu" else time.perf_counter
    seconds = []
    for seed in range(scenes):
        start = clock()
        scene = generate_scene(seed, config, device)
        scene.depth.sum().item()  # waits for the device
        seconds.append(clock() - start)
    return seconds


def main(scenes: int = 10, device: Literal["cpu", "cuda"] = "cpu", threads: int = 1) -> None:
    """Print views per second by image size and complexity.

    Args:
        scenes: scenes per row, six views each.
        device: where to render.
        threads: processor threads.
    """
    torch.set_num_threads(threads)
    print("| size | complexity | views/s | s per scene of 6 (mean) | (slowest) |\n|---|---|---|---|---|")
    for size in ((160, 120), (288, 208), (320, 256)):
        for complexity in ((0.0, 1.0), (0.2, 0.2), (1.0, 1.0)):
            seconds = seconds_per_scene(ProceduralConfig(size=size, complexity=complexity), scenes, device)
            mean = statistics.mean(seconds)
            label = f"{complexity[0]:g}" if complexity[0] == complexity[1] else "drawn from 0..1"
            print(
                f"| {size[0]}x{size[1]} | {label} | {6 / mean:.1f} | {mean:.2f} | {max(seconds):.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    tyro.cli(main)
