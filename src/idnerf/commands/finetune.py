"""`idnerf finetune`: refine the weights on one scene's own photos, for a few minutes."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Annotated

import tyro

from idnerf.commands.options import (
    check_num_sources,
    check_writable,
    choose_device,
    load_model,
    parse_size,
    parse_views,
    posed,
    progress_bar,
)
from idnerf.data.load import load_scene
from idnerf.data.scene import Scene
from idnerf.errors import InputError
from idnerf.training.finetune import (
    FROM_THREE_PHOTOS,
    FinetuneConfig,
    Split,
    held_out_psnr,
    hold_out,
    rotation,
    split_without,
)
from idnerf.training.finetune import finetune as refine
from idnerf.types import Views

LONGER_SIDE = 480
"""Photos larger than this are worked on at this size unless --size says otherwise: steps take seconds then."""


def finetune(
    scene: tyro.conf.Positional[Path],
    out: Path,
    *,
    sources: str | None = None,
    held_out: str = "auto",
    test: str | None = None,
    num_sources: int = 3,
    config: Annotated[FinetuneConfig, tyro.conf.arg(name="")] = FinetuneConfig(),  # noqa: B008
    size: str | None = None,
    weights: str = "default",
    device: str = "auto",
    scan: str | None = None,
    light: int = 3,
) -> None:
    """Refine the weights on one scene: each photo in turn is the target of the others; kept if held-out photos gain.

    Args:
        scene: folder of posed photos; its format is recognised (LLFF, transforms.json, Blender, COLMAP, DTU). A folder
            of photos without poses is posed first (see `idnerf poses`), and the result kept in it as `.idnerf`.
        out: the .safetensors file to write, for --weights of the other commands.
        sources: numbers of the photos to use, such as 0,3,7. Default: all of the scene.
        held_out: photos that say when to stop: numbers such as 2,9; rotate (each in turn, for three photos); or auto
            (one in six; rotate when there are three).
        test: photos used for nothing at all but a score before and after.
        num_sources: how many source views a target is rendered from.
        config: the refinement.
        size: size to work at, such as 480x320. Default: the photos' own, at most 480 on the longer side.
        weights: weights to start from: `default`, a file, a run folder or a hub id.
        device: auto, cpu or cuda.
        scan: which scan of a DTU root.
        light: which light of DTU, 0 to 6.
    """
    if out.suffix != ".safetensors":
        raise InputError(f"expected --out ending in .safetensors, got {out.name!r}")
    check_num_sources(num_sources)
    check_writable(out)
    wanted_size, where = parse_size(size), choose_device(device)
    tested = tuple(dict.fromkeys(parse_views(test, "--test") or ()))
    loaded = load_scene(posed(scene), scan=scan, light=light)
    loaded = loaded.resized(wanted_size or shrunk(loaded.cameras.size))
    used = choose_photos(loaded, parse_views(sources, "--sources"), tested)
    photos = loaded.views([loaded.index_of(i) for i in (*used, *tested)]).to(where)
    own, count = photos[: len(used)], len(used)
    splits = choose_splits(held_out, own, used)
    model = load_model(weights, where, "float32")

    def score_tests() -> tuple[float, ...]:
        return held_out_psnr(model, photos, range(count, len(photos)), range(count), num_sources)

    tests_before = score_tests()
    with progress_bar("refining") as update:
        result = refine(model, own, splits, config, num_sources=num_sources, progress=update)
    tests_after = score_tests()
    scored = [used[i] for i in result.scored]
    facts = {
        "scene": loaded.name,
        "photos": list(used),
        "held_out": scored,
        "steps": result.best_step,
        "psnr_before": round(mean(result.before), 3),
        "psnr_after": round(mean(result.after), 3),
    }
    model.save(out, half=False, finetuned=facts)  # what was scored, bit for bit
    print(row("held out", scored, result.before, result.after))
    if tested:
        print(row("test", tested, tests_before, tests_after))
    kept = f"the weights of step {result.best_step}" if result.best_step else "the starting weights: no step was better"
    print(
        f"{out}: {kept} ({result.curve[-1][0]} steps in {result.seconds:.0f} s; {result.stopped}), from {count} photos "
        f"of {loaded.name} ({loaded.format}) at {photos.cameras.width}x{photos.cameras.height}"
    )


def shrunk(size: tuple[int, int]) -> tuple[int, int]:
    """``size`` with a longer side of at most ``LONGER_SIDE``."""
    share = min(1.0, LONGER_SIDE / max(size))
    return max(16, round(size[0] * share)), max(16, round(size[1] * share))


def choose_photos(scene: Scene, sources: Sequence[int] | None, tested: Sequence[int]) -> list[int]:
    """View numbers to work with: those asked for, or all; never a test photo."""
    for number in tested:
        scene.index_of(number)
    if sources is None:
        chosen = [i for i in scene.view_ids if i not in tested]
    else:
        chosen = list(dict.fromkeys(sources))
        for number in chosen:
            scene.index_of(number)
        if both := sorted(set(chosen) & set(tested)):
            raise InputError(f"view {both[0]} is in --sources and in --test: a test photo is used for nothing else")
    if len(chosen) < FROM_THREE_PHOTOS:
        raise InputError(
            f"expected at least {FROM_THREE_PHOTOS} photos to refine on (a target and two sources), got {len(chosen)}"
        )
    return chosen


def choose_splits(held_out: str, photos: Views, numbers: Sequence[int]) -> list[Split]:
    """What --held-out says, as positions among the photos used."""
    if held_out == "rotate" or (held_out == "auto" and len(photos) == FROM_THREE_PHOTOS):
        return rotation(len(photos))
    if held_out == "auto":
        return [hold_out(photos)]
    if not held_out.replace(" ", "").replace(",", "").isdigit():
        raise InputError(f"expected --held-out auto, rotate, or view numbers such as 2,9; got {held_out!r}")
    chosen = dict.fromkeys(parse_views(held_out, "--held-out") or ())
    for number in chosen:
        if number not in numbers:
            raise InputError(
                f"view {number} of --held-out is not among the photos used: {', '.join(map(str, numbers))}"
            )
    split = split_without(len(photos), [list(numbers).index(number) for number in chosen])
    if len(split.sources) < FROM_THREE_PHOTOS:
        raise InputError(
            f"--held-out {held_out} leaves {len(split.sources)} of {len(photos)} photos: at least {FROM_THREE_PHOTOS} "
            "must remain; hold out fewer, or say rotate"
        )
    return [split]


def row(name: str, views: Sequence[int], before: Sequence[float], after: Sequence[float]) -> str:
    """One line: mean PSNR before and after, then view by view."""
    each = ", ".join(f"{v}: {b:.2f} > {a:.2f}" for v, b, a in zip(views, before, after, strict=True))
    return f"{name}: PSNR {mean(before):.2f} > {mean(after):.2f} dB ({mean(after) - mean(before):+.2f}; view {each})"
