"""Sixty-four fixed scenes for choosing between models: never trained on, by rig and difficulty.

Scene ``k`` of rig ``r`` at difficulty ``d`` has a seed of its own from ``FIRST_SEED`` on; training refuses seeds from
1,000,000,000 on, and the scenes held out beside a training start at exactly that number, so the three never meet.
Images are 288x208, six views. Changing the generator changes the pictures: compare models on one version of it.
"""

from collections.abc import Iterator
from itertools import islice

from idnerf.data.procedural.config import ProceduralConfig, ProceduralScene
from idnerf.data.procedural.generate import generate_scene

FIRST_SEED = 1_500_000_000
"""Seed of the first test scene."""
DIFFICULTIES = {"easy": 0.1, "medium": 0.4, "hard": 0.7, "hardest": 1.0}
"""Complexity of each level of difficulty."""
SCENES_PER_CELL = 8
"""Scenes of one rig at one difficulty."""


def named_configs() -> list[tuple[str, int, ProceduralConfig]]:
    """(name, seed, configuration) of all test scenes; names such as ``forward-easy-3``.

    The order goes round all rigs and difficulties, so that the first 8 n scenes have n of each.
    """
    entries = []
    for number in range(SCENES_PER_CELL):
        for level, complexity in DIFFICULTIES.items():
            for rig in ("forward", "inward"):
                config = ProceduralConfig(size=(288, 208), num_views=6, rig=rig, complexity=(complexity, complexity))
                entries.append((f"{rig}-{level}-{number}", FIRST_SEED + len(entries), config))
    return entries


def test_scene_configs() -> list[tuple[int, ProceduralConfig]]:
    """(seed, configuration) of all 64 test scenes, for ``generate_scene``."""
    return [(seed, config) for _, seed, config in named_configs()]


def test_scenes(limit: int | None = None) -> Iterator[tuple[str, ProceduralScene]]:
    """Generate the test scenes one by one (about a second each) with their names.

    Args:
        limit: only so many of them, balanced over rig and difficulty when a multiple of 8; None for all.
    """
    for name, seed, config in islice(named_configs(), limit):
        yield name, generate_scene(seed, config)
