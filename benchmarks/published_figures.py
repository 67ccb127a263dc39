"""Figures that papers report, for docs/scoreboard.md: quoted, not measured here."""

PUBLISHED = (
    ("MVSNeRF", "arXiv 2103.15595", "26.63 / 0.931 / 0.168", "-", "-"),
    ("MatchNeRF", "arXiv 2304.12294", "26.91 / 0.934 / 0.159", "22.43 / 0.805 / 0.244", "23.20 / 0.897 / 0.164"),
    ("ENeRF", "arXiv 2112.01517", "27.61 / 0.957 / 0.089", "-", "-"),
    ("MVSGaussian", "arXiv 2405.12218", "28.21 / 0.963 / 0.076", "24.07 / 0.857 / 0.164", "26.46 / 0.948 / 0.071"),
    ("GDB-NeRF", "CVPR 2025", "28.86 / 0.964 / 0.073", "-", "-"),
)
"""(method, where, DTU, real forward-facing, NeRF-Synthetic): PSNR / SSIM of range 2 / LPIPS, three views."""


def published_section() -> list[str]:
    """Lines of Markdown."""
    lines = [
        "## Published figures",
        "",
        "Quoted from the papers, **not measured here and not comparable with the tables above**: trained on DTU; three "
        "nearest views; DTU 640x512 over 16 test scans on the foreground; real forward-facing 960x640 over eight "
        "scenes, central 80 %; NeRF-Synthetic 800x800 over eight scenes (MatchNeRF the central 80 %, ENeRF and "
        "MVSGaussian the whole image). PSNR / SSIM of data range 2 / LPIPS. A dash: no source at hand to quote from.",
        "",
        "| method | | DTU | real forward-facing | NeRF-Synthetic |",
        "|---|---|---|---|---|",
    ]
    return lines + ["| " + " | ".join(row) + " |" for row in PUBLISHED]
