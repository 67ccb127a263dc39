"""The ablation's results as markdown: means and spreads over seeds, and differences scene by scene."""

import json
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

Scores = dict[str, Any]

COLUMNS = {
    "psnr": ("PSNR", 2),
    "ssim": ("SSIM", 4),
    "lpips": ("LPIPS", 4),
    "psnr_unseen": ("PSNR, unseen", 2),
    "ssim_unseen": ("SSIM, unseen", 4),
    "lpips_unseen": ("LPIPS, unseen", 4),
}


def mean_of(entries: Sequence[Scores], key: str) -> float | None:
    """Mean over the entries that have the key."""
    values = [entry[key] for entry in entries if entry.get(key) is not None]
    return mean(values) if values else None


def with_spread(values: Sequence[float | None], digits: int, signed: bool = False) -> str:
    """``24.61 ± 0.08``: mean and sample standard deviation over seeds; a dash where nothing was measured."""
    there = [value for value in values if value is not None]
    if not there:
        return "-"
    text = f"{mean(there):{'+' if signed else ''}.{digits}f}"
    return f"{text} ± {stdev(there):.{digits}f}" if len(there) > 1 else text


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def main_rows(runs: Mapping[str, Sequence[Scores]], titles: Mapping[str, str], n: int) -> list[list[str]]:
    """A row per variant that has results with ``n`` sources."""
    rows = []
    for name, title in titles.items():
        done = [run for run in runs[name] if f"procedural-{n}" in run]
        if not done:
            continue
        scenes = [run[f"procedural-{n}"]["scenes"] for run in done]
        cells = [with_spread([mean_of(s, key) for s in scenes], digits) for key, (_, digits) in COLUMNS.items()]
        real = [mean_of(run[f"real-{n}"], "psnr") for run in done if f"real-{n}" in run]
        rows.append([title, str(len(done)), *cells, with_spread(real, 2)])
    return rows


def difference_rows(
    runs: Mapping[str, Sequence[Scores]], titles: Mapping[str, str], n: int, pairs: Sequence[tuple[str, str]]
) -> list[list[str]]:
    """Second minus first of each pair, seed by seed: mean and spread, and the share of scenes where it is better."""
    rows = []
    for first, second in pairs:
        if first not in titles or second not in titles:
            continue
        before = {run["seed"]: run[f"procedural-{n}"]["scenes"] for run in runs[first] if f"procedural-{n}" in run}
        after = {run["seed"]: run[f"procedural-{n}"]["scenes"] for run in runs[second] if f"procedural-{n}" in run}
        seeds = sorted(before.keys() & after.keys())
        if not seeds:
            continue
        cells = []
        for key, (_, digits) in COLUMNS.items():
            changes: list[float | None] = []
            better = []
            for seed in seeds:
                gains = [
                    b[key] - a[key]
                    for a, b in zip(before[seed], after[seed], strict=True)
                    if a.get(key) is not None and b.get(key) is not None
                ]
                changes.append(mean(gains) if gains else None)
                better += [(gain < 0) if key.startswith("lpips") else (gain > 0) for gain in gains]
            share = f" ({mean(better):.0%})" if better else ""
            cells.append(with_spread(changes, digits, signed=True) + share)
        rows.append([f"{titles[second]} - {titles[first]}", *cells])
    return rows


def influence_rows(runs: Mapping[str, Sequence[Scores]], titles: Mapping[str, str], n: int) -> list[list[str]]:
    """What replacing the latent costs, and what is in it."""
    rows = []
    for name, title in titles.items():
        done = [run[f"procedural-{n}"] for run in runs[name] if "influence" in run.get(f"procedural-{n}", {})]
        if not done:
            continue
        cells = []
        for change in ("blank", "swapped"):
            for key in ("psnr", "psnr_unseen"):
                costs = []
                for run in done:
                    gains = [
                        changed[f"{change}_{key}"] - own[key]
                        for own, changed in zip(run["scenes"], run["influence"], strict=True)
                        if own[key] is not None
                    ]
                    costs.append(mean(gains) if gains else None)
                cells.append(with_spread(costs, 2, signed=True))
        for key in ("spread", "correlation"):
            cells.append(with_spread([run["latent"][key] for run in done], 2))
        rows.append([title, *cells])
    return rows


PAIRS = (
    ("no-latent", "latent"),
    ("latent", "guided-pixel"),
    ("latent", "guided-aligned"),
    ("guided-pixel", "guided-aligned"),
    ("guided-pixel", "guided-global"),
    ("no-latent", "guided-pixel"),
    ("no-latent", "guided-aligned"),
    ("no-latent", "estimate"),
    ("no-latent", "oracle"),
    ("plain", "no-latent"),
    ("latent-global", "guided-global"),
    ("paper-no-latent", "paper-latent"),
    ("paper-latent", "paper-guided"),
)
"""Differences worth a line, where both are there."""


def document(scores: Sequence[Scores], titles: Mapping[str, str], num_sources: Sequence[int]) -> str:
    """The tables of whatever runs are there."""
    runs = {name: [run for run in scores if run["variant"] == name] for name in titles}
    missing = [f"{run['variant']}-{run['seed']}" for run in scores if f"procedural-{num_sources[-1]}" not in run]
    lines = ["# Ablation of the latent and its guidance", "", "Written by `python benchmarks/ablation.py`.", ""]
    if missing:
        lines += [f"**Incomplete**: {', '.join(missing)} still to come; the same command goes on.", ""]
    lines += [
        "Means over held-out procedural scenes; ± is the standard deviation over seeds. Unseen: pixels that fewer than "
        "two sources see. Real: PSNR on the development scenes."
    ]
    for n in num_sources:
        lines += ["", f"## {n} source views", ""]
        lines += table(
            ["", "seeds", *(title for title, _ in COLUMNS.values()), "PSNR, real"], main_rows(runs, titles, n)
        )
        if rows := difference_rows(runs, titles, n, PAIRS):
            lines += ["", "Differences scene by scene (share of scenes where it is better):", ""]
            lines += table(["", *(title for title, _ in COLUMNS.values())], rows)
        if rows := influence_rows(runs, titles, n):
            lines += [
                "",
                "What the latent does: change of PSNR when it is blanked, or another scene's is put in its place;",
            ]
            lines += ["its spread, and its correlation with the prior's latent of the true picture:", ""]
            header = ["", "blank: all", "blank: unseen", "swapped: all", "swapped: unseen", "spread", "correlation"]
            lines += table(header, rows)
    if scores:
        lines += ["", "Budget of every run:", "", "```", json.dumps(scores[0]["budget"], indent=1), "```"]
    return "\n".join(lines) + "\n"
