"""The report of ``idnerf evaluate``: a dictionary with fixed keys, written whole or not at all; a table."""

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from idnerf import __version__
from idnerf.errors import InputError
from idnerf.evaluation.evaluator import SceneResult, ViewRecord
from idnerf.files import place_to_write

METRICS = ("psnr", "ssim", "ssim_range2", "lpips")
"""In every record, null where not measured."""

OPTIONAL_METRICS = (
    "psnr_unseen",
    "depth_median_relative_error",
    "depth_error_mm",
    "depth_within_2mm",
    "depth_within_10mm",
)
"""In a record only where the data tells."""

READ_KEYS = ("idnerf", "protocol", "weights", "weights_sha256", "num_sources", "size", "crop", "device", "views",
             "scenes", "mean")  # fmt: skip
"""Keys that a report must have to be read back."""

Report = dict[str, Any]


def build_report(
    results: Sequence[SceneResult],
    *,
    protocol: str,
    weights: str,
    num_sources: int,
    device: str,
    quality: str = "full",
    weights_sha256: str | None = None,
    notes: Sequence[str] = (),
) -> Report:
    """The report of one or several scenes (``docs/evaluation.md`` lists the keys).

    ``size`` and ``crop`` are null, with a note, where scenes differ in them. ``weights_sha256`` is the fingerprint of
    the weights' values: a model card takes figures only from a report of its own weights.
    """
    if not results:
        raise InputError("nothing was evaluated: no scene was given")
    size, size_notes = _common([list(r.size) for r in results], "sizes", results)
    crop, crop_notes = _common([r.crop for r in results], "crops", results)
    rows = results[0].references
    views = [record for result in results for record in result.views]
    own_notes = [note for result in results for note in result.notes]
    return {
        "idnerf": __version__,
        "protocol": protocol,
        "weights": weights,
        "weights_sha256": weights_sha256,
        "quality": quality,
        "num_sources": num_sources,
        "size": size,
        "crop": crop,
        "device": device,
        **_row(views),
        "references": {row: _row([record for r in results for record in r.references[row]]) for row in rows},
        "notes": list(dict.fromkeys([*notes, *size_notes, *crop_notes, *own_notes])),
    }


def _common(values: list[Any], what: str, results: Sequence[SceneResult]) -> tuple[Any, list[str]]:
    if all(value == values[0] for value in values):
        return values[0], []
    each = ", ".join(f"{result.scene} {value}" for result, value in zip(results, values, strict=True))
    return None, [f"{what} differ between scenes: {each}"]


def _row(views: list[ViewRecord]) -> Report:
    """Views, their mean per scene, and the mean over all views."""
    scenes = list(dict.fromkeys(record["scene"] for record in views))
    return {
        "views": views,
        "scenes": {scene: _mean([r for r in views if r["scene"] == scene], METRICS) for scene in scenes},
        "mean": _mean(views, (*METRICS, "seconds")),
    }


def _mean(views: list[ViewRecord], keys: tuple[str, ...]) -> dict[str, float | None]:
    """Mean of each metric over the views that have it."""
    means: dict[str, float | None] = {}
    for key in (*keys, *OPTIONAL_METRICS):
        values = [record[key] for record in views if record.get(key) is not None]
        if values:
            means[key] = sum(values) / len(values)
        elif key not in OPTIONAL_METRICS:
            means[key] = None
    return means


def read_report(path: Path) -> Report:
    """A report that ``write_report`` wrote.

    Raises:
        InputError: no file there, or one that is no such report; names what is missing.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"cannot read --report {path}: {error.strerror}; write it with `idnerf evaluate --json`"
        ) from None
    except ValueError:
        raise InputError(f"--report {path} is no JSON; write it with `idnerf evaluate --json`") from None
    missing = [key for key in READ_KEYS if not isinstance(report, dict) or key not in report]
    sound = not missing and all(isinstance(report[key], dict) for key in ("scenes", "mean")) and report["views"]
    if not sound:
        what = f"lacks {missing[0]!r}" if missing else "holds no scores"
        raise InputError(f"--report {path} {what}; expected what `idnerf evaluate --json` of this version writes")
    return report


def write_report(path: Path, report: Report) -> None:
    """Write ``report`` as JSON, atomically: the file is the old one or the whole new one.

    Raises ``InputError`` when the folder cannot be written or no regular file is there, ``ValueError`` for a number
    JSON cannot hold.
    """
    text = json.dumps(report, indent=1, allow_nan=False) + "\n"
    place, temporary = place_to_write(path), None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=place.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
            temporary = file.name
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, place)
    except OSError as error:
        raise InputError(f"cannot write --json {path}: {error.strerror or error}; choose another place") from None
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


_HEADINGS = {
    "psnr": ("PSNR", "{:.2f}"),
    "ssim": ("SSIM", "{:.3f}"),
    "ssim_range2": ("SSIM (range 2)", "{:.3f}"),
    "lpips": ("LPIPS", "{:.3f}"),
    "psnr_unseen": ("PSNR unseen", "{:.2f}"),
    "depth_median_relative_error": ("depth rel. error", "{:.4f}"),
    "depth_error_mm": ("depth mm", "{:.2f}"),
    "depth_within_2mm": ("< 2 mm", "{:.3f}"),
    "depth_within_10mm": ("< 10 mm", "{:.3f}"),
    "seconds": ("s/view", "{:.2f}"),
}


def print_table(report: Report, console: Console | None = None) -> None:
    """Scenes and their mean, the reference rows' means below, notes last."""
    shown = [key for key in _HEADINGS if key in report["mean"] and (key != "lpips" or report["mean"][key] is not None)]
    size = "x".join(map(str, report["size"])) if report["size"] else "several sizes"
    table = Table(
        title=f"{report['weights']} weights, {report['num_sources']} sources, protocol {report['protocol']}, {size}"
    )
    table.add_column("scene")
    for key in shown:
        table.add_column(_HEADINGS[key][0], justify="right")

    def add(name: str, means: dict[str, float | None], style: str | None = None) -> None:
        cells = ["" if means.get(key) is None else _HEADINGS[key][1].format(means[key]) for key in shown]
        table.add_row(name, *cells, style=style)

    for scene, means in report["scenes"].items():
        add(scene, means)
    table.add_section()
    add(f"mean of {len(report['views'])} views", report["mean"], style="bold")
    if report["references"]:
        table.add_section()
        for row, name in {"copy": "nearest source", "plane": "best plane", "sweep": "plane sweep"}.items():
            add(name, report["references"][row]["mean"], style="dim")
    console = console or Console()
    console.print(table)
    for note in report["notes"]:
        console.print(f"- {note}", highlight=False, markup=False)
