"""`idnerf evaluate`: render held-out views of scenes, score them, write the report."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
from idnerf.data.load import SceneSpec, distinct_names, find_scenes, load_scene
from idnerf.data.scene import Scene
from idnerf.errors import InputError
from idnerf.evaluation.evaluator import SceneResult, evaluate_scene, evaluation_plan, joined_results
from idnerf.evaluation.lpips import load_lpips
from idnerf.evaluation.protocols import get_protocol
from idnerf.evaluation.report import build_report, print_table, write_report
from idnerf.files import place_to_write
from idnerf.ranks import Ranks, join_ranks


def evaluate(
    scene: tyro.conf.Positional[Path],
    *,
    json: Path | None = None,
    protocol: str = "nearest",
    num_sources: int | None = None,
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
        num_sources: number of source views. Default: 3, or all there are where they are fewer.
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
    if num_sources is not None:
        check_num_sources(num_sources)
    if json is not None:
        check_writable(json)
        place_to_write(json)
    if save is not None:
        check_writable(save, folder=True)
    limits = {"size": parse_size(size), "crop": crop, "targets": parse_views(targets, "--targets")}
    where = choose_device(device)
    choose_precision(precision, where)  # before any work
    ranks = join_ranks(where)
    scenes = loaded_scenes(find_scenes(scene, scan=scan, light=light))
    for loaded in scenes:
        evaluation_plan(loaded, chosen, num_sources, **limits)
    model = load_model(weights, where, precision)
    lpips, reason = load_lpips(where)
    results: list[SceneResult] = []
    failures: list[tuple[str, InputError]] = []
    for loaded in scenes:
        with progress_bar(f"evaluating {loaded.name}", quiet=not ranks.first) as update:
            result = evaluated(
                ranks,
                loaded,
                lambda source, target: model.render(source, target, quality=quality),
                chosen,
                num_sources,
                **limits,
                references=references,
                lpips=lpips,
                device=where,
                save=save,
                progress=update,
            )
        if isinstance(result, SceneResult):
            results.append(result)
        elif result is not None:
            failures.append((loaded.name, result))
    if not ranks.first:
        return
    if not results:
        raise failures[0][1]
    report = build_report(
        results,
        protocol=protocol,
        weights=weights,
        num_sources=max(len(view["sources"]) for result in results for view in result.views),
        device=str(where),
        quality=quality if model.has_fast_quality else "full",
        weights_sha256=model.fingerprint(),
        notes=[
            *(f"{name} was left out: {error}" for name, error in failures),
            *([] if lpips is not None else [f"lpips was left out: {reason}"]),
            *model_notes(model, quality),
        ],
    )
    if json is not None:
        write_report(json, report)
    print_table(report)
    if json is not None:
        print(f"report: {json}")
    if failures:
        names = ", ".join(name for name, _ in failures)
        raise InputError(f"{len(failures)} of {len(scenes)} scenes failed ({names}): {failures[0][1]}")


def loaded_scenes(specs: Sequence[SceneSpec]) -> list[Scene]:
    """Every scene, under a name of its own; no photo is decoded yet."""
    names = distinct_names(specs)
    return [dataclasses.replace(load_scene(spec), name=name) for spec, name in zip(specs, names, strict=True)]


def evaluated(ranks: Ranks, scene: Scene, *arguments: Any, **options: Any) -> SceneResult | InputError | None:
    """What ``evaluate_scene`` gives with all processes together, or the first one's failure; None but on rank 0.

    The processes stay in step when one of them fails: each of them comes to the gathering.
    """
    part: SceneResult | InputError
    try:
        part = evaluate_scene(scene, *arguments, **options, ranks=ranks)
    except InputError as error:
        part = error
    parts = ranks.gather(part)
    failed = next((part for part in parts if isinstance(part, InputError)), None)
    if failed is not None or not parts:
        return failed
    return joined_results([part for part in parts if isinstance(part, SceneResult)])


def model_notes(model: Any, quality: str) -> list[str]:
    """How the model computed where that is not what was asked for, or not float32."""
    notes = []
    if model.network_precision == "bf16":
        notes.append("networks computed in bfloat16, geometry in float32 (--precision float32 for all)")
    if quality == "fast" and not model.has_fast_quality:
        notes.append("these weights know no fast quality: rendered in full")
    return notes
