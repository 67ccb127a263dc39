"""`idnerf view`: a web viewer whose picture follows the browser's camera."""

import sys
from pathlib import Path

import tyro

from idnerf.commands.options import (
    check_num_sources,
    checked_num_sources,
    choose_device,
    load_model,
    parse_size,
    parse_views,
    posed,
    working_size,
)
from idnerf.data.load import load_scene
from idnerf.errors import InputError


def view(
    scene: tyro.conf.Positional[Path],
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    sources: str | None = None,
    num_sources: int | None = None,
    size: str | None = None,
    weights: str = "default",
    device: str = "auto",
    scan: str | None = None,
    light: int = 3,
) -> None:
    """Look around in a scene in the browser; Ctrl-C stops.

    Args:
        scene: folder of posed photos; its format is recognised (LLFF, transforms.json, Blender, COLMAP, DTU). A folder
            of photos without poses is posed first (see `idnerf poses`), and the result kept in it as `.idnerf`.
        host: address to listen on. Anything but this machine's own lets others see the photos; there is no password.
        port: port to listen on; the next free one if it is taken.
        sources: start with these views, such as 0,3,7. Default: the nearest to the camera, chosen as it moves.
        num_sources: how many source views where --sources is not given. Default: 3, or all there are where they are
            fewer.
        size: size the photos are worked on at, such as 480x320. Default: their own, at most 960 on the longer side.
        weights: `default`, a file, a run folder or a hub id.
        device: auto, cpu or cuda.
        scan: which scan of a DTU root.
        light: which light of DTU, 0 to 6.
    """
    from idnerf.viewer.panel import MOST_SOURCES, Choices
    from idnerf.viewer.server import Viewer, check_address, is_any_address, is_loopback, load_viser

    load_viser()
    check_address(host, port)
    check_num_sources(num_sources)
    wanted_size, wanted_sources = parse_size(size), parse_views(sources, "--sources")
    where = choose_device(device)
    loaded = load_scene(posed(scene), scan=scan, light=light)
    loaded = loaded.resized(wanted_size or working_size(loaded))
    chosen = None if wanted_sources is None else tuple(dict.fromkeys(loaded.index_of(i) for i in wanted_sources))
    if chosen is not None and len(chosen) < 2:
        raise InputError(f"expected at least 2 different views in --sources, got {sources}")
    count = checked_num_sources(num_sources, len(loaded), MOST_SOURCES) if chosen is None else len(chosen)
    model = load_model(weights, where)
    if not is_loopback(host):
        print(
            f"idnerf: WARNING: --host {host}: whoever can reach this machine can see the photos of {loaded.name} and "
            "use its processor; there is no password and no encryption. --host 127.0.0.1 keeps it on this machine.",
            file=sys.stderr,
            flush=True,
        )
    viewer = Viewer(model, loaded, host, port, Choices(count, chosen))
    if port not in (0, viewer.port):
        print(f"port {port} is in use")
    reach = "this machine's addresses" if is_any_address(host) else host
    print(
        f"{loaded.name} ({loaded.format}, {len(loaded)} views): open {viewer.url} (listening on {reach}, Ctrl-C stops)",
        flush=True,
    )
    try:
        viewer.wait()
    finally:
        viewer.close()
