"""`idnerf check`: what a folder of data holds, before anything is rendered from it or trained on it."""

from pathlib import Path

import tyro

from idnerf.commands.options import choose_device, progress_bar
from idnerf.data.load import find_scenes, load_scene, recognise
from idnerf.data.scene import Scene
from idnerf.training.dtu_layout import inspect_dtu


def check(scene: tyro.conf.Positional[Path], *, scan: str | None = None, light: int = 3, device: str = "auto") -> None:
    """Say what a folder holds and what it lacks. Every photo is decoded; nothing is written.

    A DTU root is checked against the published lists instead, by names and headers; with --scan, that scan's photos.

    Args:
        scene: a scene folder, a folder of several scenes, or a DTU root.
        scan: which scan of a DTU root.
        light: which light of DTU, 0 to 6.
        device: auto, cpu or cuda, as for every command; photos are decoded on the CPU.
    """
    choose_device(device)
    root = scene.expanduser()
    if scan is None and recognise(root) == "dtu":
        print("\n".join(inspect_dtu(root).lines()))
        return
    for spec in find_scenes(root, scan=scan, light=light):
        loaded = load_scene(spec)
        with progress_bar(f"reading {spec.name}") as update:
            for number in range(len(loaded)):
                loaded.image(number)
                update(number + 1, len(loaded))
        print(describe(loaded))


def describe(scene: Scene) -> str:
    """A scene in one line: format, photos, depth range, exact depth."""
    cameras = scene.cameras
    with_depth = sum(photo.depth is not None for photo in scene.photos)
    return (
        f"{scene.name} ({scene.format}): {len(scene)} photos of {cameras.width}x{cameras.height}, all readable; "
        f"near {float(cameras.near.min()):.3g} to far {float(cameras.far.max()):.3g}; "
        + (f"exact depth for {with_depth}" if with_depth else "no exact depth")
    )
