"""`idnerf evaluate`: render held-out views of scenes, score them, write the report."""

import dataclasses
from pathlib import Path

import tyro

from idnerf.commands.options import (
    check_num_sources,
    check_quality,
    check_writable,
    choose_device,
    choose_precision,
    load_model,
    parse_size,
    parse_views,
    progress_bar,
)
from idnerf.data.load import distinct_names, find_scenes, load_scene
from idnerf.errors import InputError
from idnerf.evaluation.evaluator import evaluate_scene, joined_results
from idnerf.evaluation.lpips import load_lpips
from idnerf.evaluation.protocols import get_protocol
from idnerf.evaluation.report import build_report, print_table, write_report
from idnerf.ranks import join_ranks


def evaluate(
    scene: tyro.conf.Positional[Path],
    *,
    json: Path | None = None,
    protocol: str = "nearest",
    num_sources: int = 3,
    targets: str | None = None,
    size: str | None = None,
    crop: float | None = None,
    weights: str = "default",
    quality: str = "full",
    precision: str = "auto",
    references: bool = True,
    save: Path | None = None,
    device: str = "auto",
    scan: str | None = None,
    light: int = 3,
) -> None:
    """Render views of a scene that are held out, score them, print a table. Under torchrun the views are shared out.

    Args:
        scene: a scene folder, or a folder of several scenes.
        json: write the report to this file.
        protocol: `nearest` (every view in turn, from its nearest neighbours) or `mvsnerf` (published splits).
        num_sources: number of source views.
        targets: view numbers to render, such as 3,8, instead of the protocol's own.
        size: size to evaluate at, such as 480x320, instead of the protocol's own.
        crop: share of width and height that is scored, around the centre, instead of the protocol's own.
        weights: `default`, a file, a run folder or a hub id.
        quality: full, or fast.
        references: also score three rows that learn nothing: nearest source, best plane, plane sweep.
        save: folder for prediction, truth, depth and error as PNGs.
        precision: of the networks, geometry is always float32: float32, bf16 (bfloat16), or auto, which is bf16 where
            the hardware is fast at it (GPUs, CPUs with AMX or AVX-512 BF16).
        device: auto, cpu or cuda.
        scan: which scan of a DTU root; all of them by default.
        light: which light of DTU, 0 to 6.
    """
    check_quality(quality)
    chosen = get_protocol(protocol)
    if crop is not None and not 0 < crop <= 1:
        raise InputError(f"expected --crop above 0 and at most 1, got {crop}")
    check_num_sources(num_sources)
    if json is not None:
        check_writable(json)
    if save is not None:
        check_writable(save, folder=True)
    wanted, views = parse_size(size), parse_views(targets, "--targets")
    where = choose_device(device)
    choose_precision(precision, where)  # before any work
    ranks = join_ranks(where)
    specs = find_scenes(scene, scan=scan, light=light)
    model = load_model(weights, where, precision)
    lpips, reason = load_lpips(where)
    notes = [] if lpips is not None else [f"lpips was left out: {reason}"]
    if model.precision == "bf16":
        notes.append("networks computed in bfloat16, geometry in float32 (--precision float32 for all)")
    results = []
    for spec, name in zip(specs, distinct_names(specs), strict=True):
        with progress_bar(f"evaluating {name}", quiet=not ranks.first) as update:
            parts = ranks.gather(
                evaluate_scene(
                    dataclasses.replace(load_scene(spec), name=name),
                    lambda source, target: model.render(source, target, quality=quality),
                    chosen,
                    num_sources,
                    size=wanted,
                    crop=crop,
                    targets=views,
                    references=references,
                    lpips=lpips,
                    device=where,
                    save=save,
                    progress=update,
                    ranks=ranks,
                )
            )
        if ranks.first:
            results.append(joined_results(parts))
    if not ranks.first:
        return
    report = build_report(
        results,
        protocol=protocol,
        weights=weights,
        num_sources=num_sources,
        device=str(where),
        quality=quality,
        weights_sha256=model.fingerprint(),
        notes=notes,
    )
    print_table(report)
    if json is not None:
        write_report(json, report)
        print(f"report: {json}")
