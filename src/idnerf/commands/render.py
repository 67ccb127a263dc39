"""`idnerf render`: new views of a scene as pictures or video."""

import time
from collections.abc import Iterator
from pathlib import Path

import torch
import tyro
from torch import Tensor

from idnerf.commands.options import (
    check_frames,
    check_num_sources,
    check_quality,
    check_writable,
    checked_num_sources,
    choose_device,
    choose_precision,
    counted,
    load_model,
    parse_size,
    parse_views,
    posed,
    progress_bar,
    working_size,
)
from idnerf.data.load import load_scene
from idnerf.data.scene import Scene
from idnerf.data.view_selection import nearest_first, nearest_indices
from idnerf.errors import InputError
from idnerf.geometry.trajectories import camera_path
from idnerf.ranks import join_ranks
from idnerf.rendering.colormap import colorize_depth
from idnerf.rendering.frames import made_at_once
from idnerf.types import Cameras, RenderOutput
from idnerf.video import VIDEO_SUFFIXES, check_fps, write_frames, write_video


def render(
    scene: tyro.conf.Positional[Path],
    out: Path,
    *,
    sources: str | None = None,
    num_sources: int | None = None,
    target: int | None = None,
    path: str | None = None,
    frames: int = 60,
    fps: float = 24.0,
    size: str | None = None,
    weights: str = "default",
    quality: str = "full",
    precision: str = "auto",
    depth: bool = False,
    device: str = "auto",
    scan: str | None = None,
    light: int = 3,
) -> None:
    """Render new views of a scene from a few of its photos. Under torchrun the frames of a path are shared out.

    Args:
        scene: folder of posed photos; its format is recognised (LLFF, transforms.json, Blender, COLMAP, DTU). A folder
            of photos without poses is posed first (see `idnerf poses`), and the result kept in it as `.idnerf`.
        out: .png (one view), .mp4 or .gif (a camera path), or a folder (numbered PNGs).
        sources: view numbers to render from, such as 0,3,7. Default: the nearest ones.
        num_sources: how many source views where --sources is not given. Default: 3, or all there are where they are
            fewer.
        target: render the camera of this view; its own photo is not used.
        path: camera path: interpolate (through the sources), spiral, or orbit.
        frames: number of frames of the path.
        fps: frames per second of a video.
        size: size to render at, such as 480x320. Default: the photos' own, at most 960 on the longer side.
        weights: `default`, a file, a run folder or a hub id.
        quality: full, or fast (fewer depth planes and samples).
        depth: also the depth: beside the colour in a picture or video, as files of its own in a folder.
        precision: of the networks, geometry is always float32: float32, bf16 (bfloat16), or auto, which is bf16 where
            the hardware is fast at it (GPUs, CPUs with AMX or AVX-512 BF16).
        device: auto, cpu or cuda.
        scan: which scan of a DTU root.
        light: which light of DTU, 0 to 6.
    """
    check_quality(quality)
    if target is not None and path is not None:
        raise InputError("expected --target or --path, not both: one renders a view of the scene, the other a path")
    if out.suffix not in (".png", "", *VIDEO_SUFFIXES):
        raise InputError(f"expected --out ending in .png, .mp4 or .gif, or a folder; got {out.name!r}")
    if target is not None and out.suffix in VIDEO_SUFFIXES:
        raise InputError(f"--target renders one picture and --out {out.name} is a video: give a .png or a --path")
    check_writable(out, folder=out.suffix == "")
    check_frames(frames)
    check_num_sources(num_sources)
    check_fps(fps, out.suffix)
    wanted_size = parse_size(size)
    where = choose_device(device)
    choose_precision(precision, where)  # before any work
    ranks = join_ranks(where)
    with ranks.first_goes_ahead():
        folder = posed(scene, quiet=not ranks.first)
    loaded = load_scene(folder, scan=scan, light=light)
    loaded = loaded.resized(wanted_size or working_size(loaded))
    cameras, chosen = choose_views(loaded, target, parse_views(sources, "--sources"), num_sources)
    source_cameras = loaded.cameras[list(chosen)]
    if cameras is None:
        still = out.suffix == ".png"
        cameras = camera_path(path or "interpolate", source_cameras, frames)
        cameras = cameras[len(cameras) // 4][None] if still else cameras
    else:
        cameras = cameras.with_bounds(*Scene.target_bounds(source_cameras))

    model = load_model(weights, where, precision)
    start = time.perf_counter()
    with torch.inference_mode():
        features = model.encode(loaded.views(list(chosen)).to(where)[None])
        encoded = time.perf_counter() - start
        given = cameras.to(where)
        fitted = model.fit_path(features, given, quality=quality)
        with progress_bar("rendering", quiet=not ranks.first) as update:

            def frame(number: int) -> RenderOutput:
                with torch.inference_mode():  # of this thread
                    latent = model.infer_latent(features, given[number][None])
                    output = model.render_target(
                        features, fitted[number][None], quality=quality, latent=latent, fit_range=False
                    )
                    return output.map(lambda x: x.float().cpu())

            if ranks.world == 1:
                outputs = made_at_once(len(cameras), frame, where)
            else:
                outputs = ranks.made_in_order(len(cameras), frame)
            if not ranks.first:
                list(outputs)
                return
            count = write_outputs(out, counted(outputs, len(cameras), update), cameras, depth, fps)
    seconds = time.perf_counter() - start
    names = ", ".join(str(loaded.view_ids[i]) for i in chosen)
    print(
        f"{out}: {count} view{'s' if count > 1 else ''} of {loaded.name} ({loaded.format}) at "
        f"{cameras.width}x{cameras.height} from views {names}; encoding {encoded:.1f} s, "
        f"{(seconds - encoded) / count:.2f} s a view"
    )


def choose_views(
    scene: Scene, target: int | None, sources: tuple[int, ...] | None, num_sources: int | None
) -> tuple[Cameras | None, list[int]]:
    """The target camera ([1], or None for a path) and the positions of the source views."""
    chosen = None
    if sources is not None:
        chosen = [scene.index_of(i) for i in dict.fromkeys(sources)]
        if len(chosen) < 2:
            raise InputError(
                f"expected at least 2 different views in --sources, got {','.join(map(str, sources)) or 'none'}"
            )
    if target is not None:
        position = scene.index_of(target)
        if chosen is not None and position in chosen:
            raise InputError(f"view {target} is the --target and cannot be among its own --sources")
        camera, others = scene.cameras[position], [i for i in range(len(scene)) if i != position]
        if chosen is None:
            count = checked_num_sources(num_sources, len(others))
            chosen = nearest_indices(scene.cameras, camera, count, others, elsewhere_last=True)
        return camera[None], chosen
    if chosen is None:
        chosen = central_views(scene.cameras, checked_num_sources(num_sources, len(scene)))
    return None, chosen


def central_views(cameras: Cameras, count: int) -> list[int]:
    """The view nearest to the mean camera centre and its nearest neighbours, ordered along their longest extent."""
    centers = cameras.centers
    middle = int((centers - centers.mean(0)).norm(dim=-1).argmin())
    others = [i for i in nearest_first(cameras, cameras[middle], elsewhere_last=True) if i != middle]
    chosen = torch.tensor([middle, *others][:count])
    offsets = centers[chosen] - centers[chosen].mean(0)
    _, _, axes = torch.linalg.svd(offsets)
    return chosen[(offsets @ axes[0]).argsort()].tolist()


def write_outputs(out: Path, outputs: Iterator[RenderOutput], cameras: Cameras, depth: bool, fps: float) -> int:
    """Write render outputs [1] to a picture, a video or a folder; returns how many."""
    near, far = float(cameras.near.min()), float(cameras.far.max())

    def picture(output: RenderOutput) -> Tensor:
        rgb = output.rgb[0].float()
        return torch.cat([rgb, colorize_depth(output.depth[0].float(), near, far)], -1) if depth else rgb

    if out.suffix in VIDEO_SUFFIXES:
        return write_video(out, (picture(o) for o in outputs), fps)
    if out.suffix == ".png":
        from idnerf.data.image_io import write_png

        for output in outputs:
            write_png(out, picture(output))
        return 1

    def files() -> Iterator[dict[str, Tensor]]:
        for output in outputs:
            pictures = {"rgb": output.rgb[0].float()}
            if depth:
                pictures["depth"] = colorize_depth(output.depth[0].float(), near, far)
                pictures["depth_z"] = output.depth.float()
            yield pictures

    return write_frames(out, files())
