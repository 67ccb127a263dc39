"""Time and memory of the default configuration against image size, source views, frames and processes.

python benchmarks/scale.py --page docs/performance.md --plot docs/images/scale.svg
python benchmarks/scale.py --quick                         # small pictures, few points
python benchmarks/scale.py --device cuda --out out/scale.md
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from idnerf.commands.options import choose_device, parse_size
from idnerf.errors import InputError
from pages import put_between_marks
from speed import Options as SpeedOptions
from speed import figures, machine_lines, measure_all
from speed_cases import Case, Effort

SIZES = ("320x256", "480x320", "640x512", "960x640", "1280x720", "1920x1080")
VIEWS = (2, 3, 4, 6, 8, 10)
FRAMES = (1, 2, 4, 8, 30, 120)
SIZE_OF_VIEWS = (320, 256)
"""At which the number of views and of frames is varied."""
QUALITIES = ("cascade full", "cascade fast")

Row = tuple[float, dict[str, float]]
"""(Megapixels, views or frames; measured numbers by column)."""


@dataclass(frozen=True)
class Options:
    """Measure how time and memory grow.

    Attributes:
        device: auto, cpu or cuda.
        threads: of PyTorch on the CPU.
        clock: wall, or processor time (a shared machine; one thread).
        out: also write the tables to this file.
        page: put the tables into this page, in the place of those between its `scale` marks.
        plot: write the curves to this SVG (matplotlib).
        results: measurements are kept in this file, line by line; what is there already is not measured again.
        quick: small pictures, few points.
        sizes: image sizes.
        views: numbers of source views.
        frames: lengths of a path.
        processes: numbers of processes to share frames and training among; none leaves that table out, and on GPUs
            those are left out for which there are too few.
        repeats: medians of so many.
    """

    device: str = "auto"
    threads: int = 0
    clock: Literal["wall", "processor"] = "wall"
    out: Path | None = None
    page: Path | None = None
    plot: Path | None = None
    results: Path | None = None
    quick: bool = False
    sizes: tuple[str, ...] = SIZES
    views: tuple[int, ...] = VIEWS
    frames: tuple[int, ...] = FRAMES
    processes: tuple[int, ...] = (1, 2)
    repeats: int = 3


def measure_growth(
    cases: Sequence[tuple[float, Case]], measure: Callable[[Case], dict[str, Any]], stages: Sequence[str]
) -> list[Row]:
    """One row per point: seconds and peak memory of encoding, and of rendering in both qualities."""
    rows = []
    for point, case in cases:
        columns: dict[str, float] = {}
        for system in QUALITIES:
            for stage in stages:
                if stage == "encode" and system != QUALITIES[0]:
                    continue  # the same in both
                result = measure(replace(case, system=system, stage=stage))
                if "failed" in result:
                    raise InputError(f"{system}, {stage} at {case.size[0]}x{case.size[1]}: {result['failed']}")
                quality = system.removeprefix("cascade ")
                names = ("encode s", "encode GB") if stage == "encode" else (f"{quality} s", f"{quality} GB")
                columns |= dict(zip(names, (result["seconds"], result["peak_gb"]), strict=True))
        rows.append((point, columns))
    return rows


def table(rows: Sequence[Row], name: str, label: Callable[[float], str]) -> list[str]:
    columns = list(rows[0][1])
    lines = [f"| {name} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    return lines + [f"| {label(point)} | " + " | ".join(figures(row[c]) for c in columns) + " |" for point, row in rows]


def shared_among(processes: int, options: Options, device: str) -> dict[str, Any]:
    """What ``processes.py`` prints with so many processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    script = [str(Path(__file__).with_name("processes.py")), "--device", device]
    arguments = ["--frames", "2" if options.quick else "8", "--repeats", "1" if options.quick else "3"]
    command = [sys.executable, *(launcher if processes > 1 else []), *script, *arguments]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        raise InputError(f"{processes} processes: {process.stderr.strip().splitlines()[-1]}")
    return json.loads(process.stdout.strip().splitlines()[-1])


@dataclass(frozen=True)
class Network:
    """A ring of GPUs: bytes per second that each sends while it receives, and seconds until a message arrives."""

    name: str
    gpus: int
    bandwidth: float
    latency: float


NETWORKS = (
    Network("8 in one machine, NVLink 4 (450 GB/s each way)", 8, 450e9, 5e-6),
    Network("64 in 8 machines, 400 Gbit/s for each GPU", 64, 50e9, 10e-6),
    Network("64 in 8 machines, 100 Gbit/s for each GPU", 64, 12.5e9, 10e-6),
)
"""Assumed, not measured."""


def all_reduce_seconds(size: int, network: Network) -> float:
    """Ring all-reduce of ``size`` bytes: 2 (n - 1) messages of size / n, one after the other."""
    steps = 2 * (network.gpus - 1)
    return steps * (size / network.gpus / network.bandwidth + network.latency)


def communication_table(size: int) -> list[str]:
    lines = [
        f"Gradients: {size / 1e6:.1f} MB of float32, summed once a step by a ring all-reduce: each GPU sends and "
        "receives 2 (n - 1) / n of them in 2 (n - 1) messages. Assumed: the bandwidths in the table, 5 us a message "
        "inside a machine and 10 us between machines.",
        "",
        "| GPUs | sent by each | seconds a step |",
        "|---|---|---|",
    ]
    for network in NETWORKS:
        sent = 2 * (network.gpus - 1) / network.gpus * size
        lines.append(f"| {network.name} | {sent / 1e6:.1f} MB | {all_reduce_seconds(size, network):.4f} |")
    return lines


def process_lines(shared: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "### Processes",
        "",
        "At 320x256, wall time, one thread a process; a training step takes one scene of 4096 rays in every process.",
        "",
        "| processes | frames a second | training step s | scenes a second |",
        "|---|---|---|---|",
    ]
    for s in shared:
        lines.append(
            f"| {s['world']} | {s['frames'] / s['frames_seconds']:.2f} | {figures(s['step_seconds'])} | "
            f"{s['world'] / s['step_seconds']:.2f} |"
        )
    return [*lines, "", *communication_table(shared[0]["gradient_bytes"])]


def draw(path: Path, growths: Sequence[tuple[str, Sequence[Row]]]) -> None:
    """Seconds above, gigabytes below, one column for each of what grows."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "idnerf"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(growths), figsize=(3.2 * len(growths), 5), squeeze=False, sharex="col")
    for column, (name, rows) in enumerate(growths):
        for quality, colour in (("full", "tab:blue"), ("fast", "tab:orange")):
            points = [point for point, _ in rows]
            for axis, unit in zip(axes[:, column], ("s", "GB"), strict=True):
                values = [row[f"{quality} {unit}"] for _, row in rows]
                axis.plot(points, values, marker="o", markersize=3, color=colour, label=quality)
                axis.set_xlim(left=0)
                axis.set_ylim(bottom=0)
                axis.grid(alpha=0.3)
        axes[1, column].set_xlabel(name)
    axes[0, 0].set_ylabel("seconds")
    axes[1, 0].set_ylabel("peak memory, GB")
    axes[0, 0].legend(frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def picture_line(plot: Path, page: Path) -> str:
    """The curves, as the page shows them."""
    link = Path(os.path.relpath(plot, page.parent)).as_posix()
    return f"![Seconds and peak memory against image size, source views and frames]({link})\n\n"


def main(options: Options) -> None:
    """Measure what is not yet known, print the tables, draw the curves."""
    device = choose_device(options.device).type
    processor = options.clock == "processor"
    threads = options.threads or (1 if processor else torch.get_num_threads())
    effort = Effort(device, threads, processor, repeats=1 if options.quick else options.repeats)
    measure = measure_all(SpeedOptions(results=options.results), effort)
    sizes = [size for text in (("96x64", "192x128") if options.quick else options.sizes) if (size := parse_size(text))]
    small = sizes[0] if options.quick else SIZE_OF_VIEWS
    views = VIEWS[:2] if options.quick else options.views
    frames = FRAMES[:2] if options.quick else options.frames
    case = Case("", "", small)
    of_size = measure_growth(
        [(w * h / 1e6, replace(case, size=(w, h))) for w, h in sizes], measure, ("encode", "render")
    )
    of_views = measure_growth([(n, replace(case, sources=n)) for n in views], measure, ("encode", "render"))
    of_frames = measure_growth([(n, replace(case, frames=n)) for n in frames], measure, ("frames",))
    there = torch.cuda.device_count() if device == "cuda" else max(options.processes, default=0)
    shared = [shared_among(n, options, device) for n in options.processes if n <= there]

    names = {w * h / 1e6: f"{w}x{h}" for w, h in sizes}
    lines = [*machine_lines(effort), "", "### Image size", "", "Three sources of the same size as the target.", ""]
    lines += [*table(of_size, "size", names.__getitem__), "", "### Source views", ""]
    lines += [f"At {small[0]}x{small[1]}.", "", *table(of_views, "views", lambda n: f"{n:.0f}"), "", "### Frames", ""]
    lines += [f"At {small[0]}x{small[1]}, encoding included.", ""]
    lines += [*table(of_frames, "frames", lambda n: f"{n:.0f}"), ""]
    if shared:
        lines += process_lines(shared)
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text, encoding="utf-8")
    if options.page is not None:
        picture = "" if options.plot is None else picture_line(options.plot, options.page)
        put_between_marks(options.page, "scale", picture + text)
    if options.plot is not None:
        draw(options.plot, (("megapixels", of_size), ("source views", of_views), ("frames", of_frames)))


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except InputError as error:
        print(f"scale.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
