"""`idnerf poses`: photos without poses to a scene with poses."""

from pathlib import Path

import tyro

from idnerf.commands.options import check_writable, choose_device, progress_bar
from idnerf.poses.config import PosesConfig
from idnerf.poses.estimate import estimate_poses


def poses(
    photos: tyro.conf.Positional[Path],
    out: Path,
    *,
    device: str = "auto",
    config: tyro.conf.OmitArgPrefixes[PosesConfig] = PosesConfig(),  # noqa: B008
) -> None:
    """Find the poses of your own photos (structure from motion by pycolmap, on the CPU).

    Writes undistorted pictures, `transforms.json` with near and far, a COLMAP model and a report (`poses.json`).

    Args:
        photos: folder of photos of one still scene: 3 or more (2 with a known focal length), one lens, no zoom.
        out: new folder for the posed scene.
        device: auto, cpu or cuda, as for every command; pycolmap's own wheels need the CPU alone.
        config: how to find them.
    """
    choose_device(device)
    check_writable(out, folder=True)
    with progress_bar("finding poses") as update:
        report = estimate_poses(photos, out, config, update)
    print(f"{out}: " + "\n".join(report.lines()))
