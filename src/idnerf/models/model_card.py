"""The model card of a set of weights, in words: what it is, what it was trained on, how it scored, how to load it.

Every figure comes from a report of ``idnerf evaluate`` and every fact from the weights' own file or from the caller;
what nobody said, the card says is not known.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from idnerf.hub import WEIGHTS_FILE, Figure

Report = Mapping[str, Any]
"""What ``idnerf evaluate --json`` writes (docs/evaluation.md)."""

CARD_METRICS = {
    "psnr": ("PSNR (dB)", 2),
    "ssim": ("SSIM (range 1)", 3),
    "ssim_range2": ("SSIM (range 2)", 3),
    "lpips": ("LPIPS (VGG)", 3),
}
"""Metrics shown, with their heading and digits."""

REFERENCE_ROWS = {"copy": "nearest source photo", "plane": "best plane", "sweep": "plane sweep"}
"""Rows of a report that learn nothing, in words."""


@dataclass(frozen=True)
class CardFacts:
    """What a card says about the weights themselves.

    Attributes:
        name: title.
        location: what ``from_pretrained`` and ``--weights`` take: a hub id, or a folder.
        configuration: cascade or paper.
        parameters: how many numbers.
        fingerprint: of the weights' values (``checkpoint.fingerprint``).
        header: what the weights' file records beside the configuration.
        data: what the weights were trained on, by the caller's word; None takes it from the header.
        licence: such as ``apache-2.0``; None where nobody said.
    """

    name: str
    location: str
    configuration: str
    parameters: int
    fingerprint: str
    header: Mapping[str, Any]
    data: str | None = None
    licence: str | None = None


def card_text(facts: CardFacts, report: Report | None) -> str:
    """The card below its metadata, in Markdown."""
    parts = [
        f"# {facts.name}",
        "Weights of idnerf: two or three posed photos of a scene it has never seen go in; new views, depth and video "
        "come out, without training on that scene. The method is ID-NeRF's (Li, Gou, Tan, "
        "[arXiv 2402.01217](https://arxiv.org/abs/2402.01217)) and MatchNeRF's (Chen et al., "
        "[arXiv 2304.12294](https://arxiv.org/abs/2304.12294)).",
        "## Load",
        _loading(facts),
        "## What it is",
        _table(
            ("", ""),
            [
                ("configuration", f"`{facts.configuration}`"),
                ("parameters", f"{facts.parameters:,}"),
                ("file", f"`{WEIGHTS_FILE}` (safetensors; nothing in it is executed)"),
                ("fingerprint", f"`{facts.fingerprint}` (`IDNeRF.fingerprint()`)"),
            ],
        ),
        "## Training",
        _table(("", ""), _training(facts)),
        "## Measured",
        "Nothing was measured for this card." if report is None else _measured(report),
        "## Licence",
        f"`{facts.licence}`"
        if facts.licence
        else "None is stated: ask whoever shares these weights before using them.",
    ]
    return "\n\n".join(parts)


def card_figures(report: Report | None) -> list[Figure]:
    """Every scene's means and the mean over all views, as evaluation results of the card's metadata."""
    if report is None:
        return []
    setting = _setting(report)
    rows = {**report["scenes"], f"mean of {len(report['views'])} views": report["mean"]}
    return [
        Figure(str(scene), setting, metric, round(means[metric], digits + 1))
        for scene, means in rows.items()
        for metric, (_, digits) in CARD_METRICS.items()
        if means.get(metric) is not None
    ]


def _loading(facts: CardFacts) -> str:
    return (
        "With idnerf installed:\n\n"
        f"```\nidnerf render SCENE --out view.png --target 12 --weights {facts.location}\n```\n\n"
        "```python\nimport idnerf\n\n"
        f'model = idnerf.IDNeRF.from_pretrained("{facts.location}")\n'
        'scene = idnerf.load_scene("SCENE")\n'
        "out = model.render(scene.nearest(scene.cameras[12], n=3), scene.cameras[12])  # rgb, depth, opacity\n```"
    )


def _training(facts: CardFacts) -> list[tuple[str, str]]:
    header = facts.header
    recorded = dict(header.get("training") or {})
    data = facts.data or recorded.pop("data", None)
    recorded.pop("data", None)
    rows = [("data", data or "not recorded in the file, and not stated")]
    if header.get("source"):
        rows.append(("converted from", f"{header['source']} (`idnerf convert`)"))
    if header.get("step") is not None:
        rows.append(("steps", f"{header['step']:,}"))
    rows += [(name.replace("_", " "), _plain(value)) for name, value in recorded.items()]
    for name, value in dict(header.get("finetuned") or {}).items():
        rows.append((f"refined on one scene: {name.replace('_', ' ')}", _plain(value)))
    return rows


def _measured(report: Report) -> str:
    shown = [metric for metric in CARD_METRICS if report["mean"].get(metric) is not None]
    rows = {scene: means for scene, means in report["scenes"].items()}
    rows[f"**mean of {len(report['views'])} views**"] = report["mean"]
    for row, name in REFERENCE_ROWS.items():
        if row in report.get("references", {}):
            rows[f"for comparison, learns nothing: {name}"] = report["references"][row]["mean"]
    table = _table(
        ("scene", *(CARD_METRICS[metric][0] for metric in shown)),
        [
            (scene, *("" if means.get(m) is None else f"{means[m]:.{CARD_METRICS[m][1]}f}" for m in shown))
            for scene, means in rows.items()
        ],
    )
    notes = [f"* {note}" for note in report.get("notes", [])]
    how = f"By `idnerf evaluate` {report['idnerf']}: {_setting(report)}, on {report['device']}."
    return "\n\n".join([how, table, *(["\n".join(notes)] if notes else [])])


def _setting(report: Report) -> str:
    size, crop = report["size"], report["crop"]
    return ", ".join(
        [
            f"protocol {report['protocol']}",
            f"{report['num_sources']} sources",
            "several sizes" if size is None else f"{size[0]}x{size[1]}",
            "several crops" if crop is None else "whole image" if crop == 1 else f"central {crop:.0%}",
            f"quality {report.get('quality', 'full')}",
        ]
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
