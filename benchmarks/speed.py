"""Seconds and peak memory of every configuration beside the published code, on one machine in one run.

python benchmarks/speed.py --reference REFERENCE --page docs/performance.md     # hours on a CPU (published_code.py)
python benchmarks/speed.py --quick                                              # minutes: small pictures
python benchmarks/speed.py --device cuda --out out/speed.md                     # a GPU, unattended

Each case runs in a process of its own, so that its peak memory is its own (a process that has only imported PyTorch and
the package counts some 0.3 GB). Rendering is timed after encoding. On a machine that others use too, ``--clock
processor`` counts processor time, with one thread.
"""

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from boards import weights_hash
from idnerf.commands.options import choose_device
from idnerf.errors import InputError
from idnerf.geometry.precision import has_fast_bfloat16
from pages import put_between_marks
from speed_cases import OURS, PUBLISHED, PUBLISHED_SLICE, Case, Effort

SIZES = ((640, 512), (960, 640))
QUICK_SIZES = ((160, 128),)
CASCADE_STEP = (320, 256)
"""Size of the sources in the cascade's own training steps."""
BASELINES = {"matchnerf": "published matchnerf", "idnerf": "published idnerf"}
"""The published code that each configuration is compared with; the cascade with ID-NeRF's, which it takes further."""


@dataclass(frozen=True)
class Options:
    """Measure the speed of every configuration.

    Attributes:
        device: auto, cpu or cuda.
        threads: of PyTorch on the CPU.
        clock: wall, or processor time (a shared machine; one thread).
        reference: folder with checkouts of the published code, `matchnerf` and `idnerf` (published_code.py).
        out: also write the tables to this file.
        page: put the tables into this page, in the place of those between its `speed` marks.
        results: measurements are kept in this file, line by line; what is there already is not measured again.
        quick: small pictures and short runs.
        systems: only these, such as `cascade full`.
        stages: only these: encode, render, train, roofline.
        whole: render an image whole where that takes at most so many seconds, else a part of its rows.
        part: seconds that such a part may take.
        repeats: medians of so many.
    """

    device: str = "auto"
    threads: int = 0
    clock: Literal["wall", "processor"] = "wall"
    reference: Path | None = None
    out: Path | None = None
    page: Path | None = None
    results: Path | None = None
    quick: bool = False
    systems: tuple[str, ...] = ()
    stages: tuple[str, ...] = ("encode", "render", "train", "roofline")
    whole: float = 600.0
    part: float = 30.0
    repeats: int = 3


def cases(options: Options, device: str) -> Iterator[Case]:
    """All that is to be measured, in the order of the tables."""
    sizes = QUICK_SIZES if options.quick else SIZES
    systems = (*PUBLISHED, *OURS) if options.reference else OURS
    if options.reference and not options.systems:
        yield Case("matchnerf", "agreement", (96, 64))
    for system in options.systems or systems:
        for stage in options.stages:
            if stage == "roofline":
                if system in OURS:
                    yield Case(system, stage, sizes[0])
                continue
            for size in sizes if stage != "train" else sizes[:1]:
                case = Case(system, stage, size, rays=256 if options.quick else 1024)
                yield case
                if stage == "train" and system in BASELINES and has_fast_bfloat16(device):
                    yield replace(case, precision="bf16")
        if system.startswith("cascade") and "train" in options.stages and not options.quick:
            yield Case(system, "train", CASCADE_STEP, rays=4096)
            if device == "cuda":
                yield Case(system, "train", CASCADE_STEP, rays=4096, scenes=4)


def measured(case: Case, effort: Effort, reference: Path | None) -> dict[str, Any]:
    """Run one case in a fresh process; ``{"failed": why}`` where it ends without a result."""
    order = {"case": asdict(case), "effort": asdict(effort), "reference": str(reference) if reference else None}
    command = [sys.executable, str(Path(__file__).with_name("speed_cases.py")), json.dumps(order)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        lines = process.stderr.strip().splitlines() or [f"ended with {process.returncode}"]
        return {"failed": lines[-1]}
    return json.loads(process.stdout.strip().splitlines()[-1])


def key_of(case: Case, effort: Effort) -> str:
    """What a kept measurement is of: on another machine, or of other default weights, a case is measured anew."""
    setting = [effort.device, effort.threads, effort.processor, effort.repeats]
    return json.dumps([asdict(case), *setting, machine_lines(effort), weights_hash("default")])


def measure_all(options: Options, effort: Effort) -> Callable[[Case], dict[str, Any]]:
    """A function that measures a case, or finds it in ``options.results``; what it measures it puts there."""
    known: dict[str, dict[str, Any]] = {}
    if options.results is not None and options.results.is_file():
        for line in options.results.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            known[entry["key"]] = entry["result"]

    def measure(case: Case) -> dict[str, Any]:
        key = key_of(case, effort)
        if key in known and "failed" not in known[key]:
            return known[key]
        start = time.perf_counter()
        known[key] = measured(case, effort, options.reference)
        took = time.perf_counter() - start
        print(f"{case}: {took:.0f} s, {str(known[key])[:160]}", file=sys.stderr, flush=True)
        if options.results is not None:
            options.results.parent.mkdir(parents=True, exist_ok=True)
            with options.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "result": known[key]}) + "\n")
        return known[key]

    return measure


def page(results: list[tuple[Case, dict[str, Any]]], effort: Effort) -> str:
    """The tables as Markdown."""
    lines = [*machine_lines(effort), ""]
    for case, result in results:
        if case.stage == "agreement" and "difference" in result:
            lines += [
                f"Our colours differ from MatchNeRF's code, given its weights, by {result['difference']:.1e} at most.",
                "",
            ]
    for stage, title in (
        ("encode", "Encoding"),
        ("render", "Rendering, sources encoded"),
        ("train", "A training step"),
    ):
        rows = [(case, result) for case, result in results if case.stage == stage]
        if rows:
            lines += [f"### {title}", "", *stage_table(rows), ""]
    for case, result in results:
        if case.stage == "roofline" and "failed" not in result:
            lines += [f"### Roofline of {case.system}, {case.size[0]}x{case.size[1]}", "", *roofline_table(result), ""]
    return "\n".join(lines)


def machine_lines(effort: Effort) -> list[str]:
    name = torch.cuda.get_device_name() if effort.device == "cuda" else processor_name()
    counted = "processor time" if effort.processor else "wall time"
    return [
        f"{name}, {effort.threads} thread{'s' * (effort.threads != 1)}, PyTorch {torch.__version__}, "
        f"float32{', the cascade bfloat16' * has_fast_bfloat16(torch.device(effort.device))}; "
        f"{counted}, medians of {effort.repeats} (one run where it takes more than {effort.part:g} s)."
    ]


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def stage_table(rows: list[tuple[Case, dict[str, Any]]]) -> list[str]:
    """Seconds, memory, and the published code's seconds over ours on the same size."""
    of_published = {(case.system, case.size): result["seconds"] for case, result in rows if "seconds" in result}
    lines = ["| | size | seconds | peak GB | published / ours | |", "|---|---|---|---|---|---|"]
    for case, result in rows:
        size = f"{case.size[0]}x{case.size[1]}"
        if "failed" in result:
            lines.append(f"| {case.system} | {size} | failed | | | {result['failed'].replace('|', '/')} |")
            continue
        baseline = None
        if case.system in OURS and not (case.stage == "train" and case.size == CASCADE_STEP):
            baseline = of_published.get((BASELINES.get(case.system, "published idnerf"), case.size))
        ratio = "" if baseline is None else f"{baseline / result['seconds']:.1f}"
        lines.append(
            f"| {case.system} | {size} | {figures(result['seconds'])} | {result['peak_gb']:.2f} | {ratio} | "
            f"{remark(case, result)} |"
        )
    return lines


def figures(value: float) -> str:
    """Three significant figures, never in powers of ten."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def remark(case: Case, result: dict[str, Any]) -> str:
    remarks = []
    if case.stage == "train":
        scenes = "" if case.scenes == 1 else f"{case.scenes} scenes of "
        remarks.append(f"{scenes}{case.rays} rays{', encoder bfloat16' * (case.precision == 'bf16')}")
    if result["share"] < 1:
        remarks.append(f"from {result['share']:.1%} of the rows")
    if case.system in PUBLISHED and case.stage == "render":
        remarks.append(f"{PUBLISHED_SLICE} rays at once")
    return ", ".join(remarks)


def roofline_table(result: dict[str, Any]) -> list[str]:
    """Every stage's work, time and share of its floor, for encoding and per ray."""
    rates = result["rates"]
    lines = [
        f"Matrix product {rates['matmul'] / 1e9:.0f} GFLOP/s, copy {rates['copy'] / 1e9:.0f} GB/s (read and written).",
        "",
        "| stage | MFLOP | MB | ms | floor ms | share |",
        "|---|---|---|---|---|---|",
    ]
    for part, title in (("encode", "encode: "), ("ray", "a ray: ")):
        stages = result[part]
        total = {k: sum(stage[k] for stage in stages.values()) for k in ("flops", "bytes", "seconds", "floor")}
        for name, cost in [*stages.items(), ("all", total)]:
            share = cost["floor"] / cost["seconds"] if cost["seconds"] else 0.0
            lines.append(
                f"| {title}{name} | {figures(cost['flops'] / 1e6)} | {figures(cost['bytes'] / 1e6)} | "
                f"{figures(1e3 * cost['seconds'])} | {figures(1e3 * cost['floor'])} | {share:.0%} |"
            )
    return lines


def main(options: Options) -> None:
    """Measure what is not yet known, print the page."""
    device = choose_device(options.device).type
    processor = options.clock == "processor"
    threads = options.threads or (1 if processor else torch.get_num_threads())
    if processor and (device == "cuda" or threads != 1):
        raise InputError("--clock processor counts one thread of the CPU: leave --threads and --device cuda out")
    unknown = [s for s in options.systems if s not in (*PUBLISHED, *OURS)]
    if unknown:
        raise InputError(f"--systems: expected some of {', '.join((*PUBLISHED, *OURS))}; got {unknown[0]!r}")
    if any(s in PUBLISHED for s in options.systems) and options.reference is None:
        raise InputError("--systems published ...: expected --reference DIR with checkouts of the published code")
    effort = Effort(device, threads, processor, options.whole, options.part, options.repeats)
    if options.quick:
        effort = Effort(device, threads, processor, whole=min(options.whole, 10.0), part=3.0, repeats=1)
    measure = measure_all(options, effort)
    text = page([(case, measure(case)) for case in cases(options, device)], effort)
    print(text)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text, encoding="utf-8")
    if options.page is not None:
        put_between_marks(options.page, "speed", text)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except InputError as error:
        print(f"speed.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
