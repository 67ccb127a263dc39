"""`idnerf scenes`: procedural scenes to disk."""

from pathlib import Path

import tyro

from idnerf.commands.options import check_writable, choose_device, progress_bar
from idnerf.data.procedural.config import ProceduralConfig
from idnerf.data.procedural.files import save_scene
from idnerf.data.procedural.generate import generate_scene
from idnerf.errors import InputError


def scenes(
    out: Path,
    count: int = 1,
    seed: int = 0,
    device: str = "cpu",
    config: tyro.conf.OmitArgPrefixes[ProceduralConfig] = ProceduralConfig(),  # noqa: B008
) -> None:
    """Write procedural scenes: images, exact depth, `transforms.json`.

    Args:
        out: folder that gets one folder per scene.
        count: number of scenes.
        seed: seed of the first scene; the same seed and options give the same scene.
        device: auto, cpu or cuda; a GPU's scenes differ from the CPU's in the last bits.
        config: what to generate.
    """
    if count < 1:
        raise InputError(f"expected --count of at least 1, got {count}")
    if seed < 0:
        raise InputError(f"expected --seed of 0 or more, got {seed}")
    where = choose_device(device)
    check_writable(out, folder=True)
    with progress_bar("generating") as update:
        for number in range(count):
            scene = generate_scene(seed + number, config, where)
            save_scene(scene, out / scene.name)
            update(number + 1, count)
    print(f"{out}: {count} scene{'s' if count > 1 else ''} of {config.num_views} views")
