"""3. Scoring: the default weights, and a renderer of one's own, on held-out views."""

from pathlib import Path

import tyro

import idnerf
from idnerf.evaluation.evaluator import evaluate_scene
from idnerf.evaluation.protocols import get_protocol
from idnerf.evaluation.report import build_report, print_table, write_report


def main(scene: Path | None = None, out: Path = Path("out/examples"), targets: int = 2, width: int = 320) -> None:
    """Hold views out in turn, render each from its three nearest neighbours, score, compare with learning nothing.

    Args:
        scene: folder of posed photos; the bundled scene by default.
        out: folder for report.json.
        targets: how many views are held out in turn.
        width: of the pictures, in pixels.
    """
    loaded = idnerf.load_scene(scene or idnerf.demo_folder())
    size = (width, round(width * loaded.cameras.height / loaded.cameras.width))
    model = idnerf.IDNeRF.from_pretrained()

    # Any function of (source views, target camera) can be scored; it never sees the target's photo.
    def renderer(source: idnerf.Views, target: idnerf.Cameras) -> idnerf.RenderOutput:
        return model.render(source, target, quality="fast")

    result = evaluate_scene(
        loaded, renderer, get_protocol("nearest"), num_sources=3, size=size, targets=loaded.view_ids[:targets]
    )
    report = build_report([result], protocol="nearest", weights="default, fast", num_sources=3, device="cpu")
    print_table(report)
    write_report(out / "report.json", report)
    print(f"report: {out / 'report.json'}")


if __name__ == "__main__":
    tyro.cli(main)
