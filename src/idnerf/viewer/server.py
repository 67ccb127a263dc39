"""The one file that knows viser: a web server whose browsers become sessions."""

import contextlib
import io
import ipaddress
import socket
import threading
from types import ModuleType
from typing import Any

import torch

from idnerf.data.scene import Scene
from idnerf.data.view_selection import spread_indices
from idnerf.errors import InputError
from idnerf.models.idnerf import IDNeRF
from idnerf.viewer.panel import Choices
from idnerf.viewer.photo_frusta import MOST_SHOWN
from idnerf.viewer.picture import Picture
from idnerf.viewer.scene_renderer import SceneRenderer
from idnerf.viewer.scheduler import RenderScheduler
from idnerf.viewer.session import Session, central_view
from idnerf.viewer.view_point import field_inside_photo, pose_of
from idnerf.viewer.world_frame import fit_world_frame

THUMBNAIL_SIDE = 160
"""Longer side of the photos on the frusta, in pixels."""


def load_viser() -> ModuleType:
    """Raises InputError where viser is not installed."""
    try:
        import viser
    except ImportError:
        raise InputError("the viewer needs viser: pip install '.[viewer]' in a checkout") from None
    return viser


class Viewer:
    """Serves a scene until ``close``.

    Args:
        model: in evaluation mode, on its device.
        scene: at its working size.
        host, port: where to listen; the next free port is taken if this one is in use (0: any).
        start: what the panels start with.

    Raises:
        InputError: viser is not installed, or this machine cannot listen there.
    """

    def __init__(
        self,
        model: IDNeRF,
        scene: Scene,
        host: str = "127.0.0.1",
        port: int = 8080,
        start: Choices | None = None,
    ):
        viser = load_viser()
        check_address(host, port)
        self._scene, self._start = scene, start or Choices()
        self._frame = fit_world_frame(scene.cameras)
        self._start_view = central_view(scene)
        self._shown = spread_indices(scene.cameras.centers, MOST_SHOWN)
        self._photos: dict[int, Any] = {}
        self._sessions: dict[int, Session] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._renderer = SceneRenderer(model, scene)
        self._scheduler = RenderScheduler(self._renderer.render, self._deliver, self._complain)
        with contextlib.redirect_stdout(io.StringIO()):  # viser's own banner: the command prints ours
            self._server = viser.ViserServer(host=host, port=port, label=f"idnerf: {scene.name}", verbose=False)
        # viser can publish a server through a tunnel at a browser's request. Not here.
        self._server.request_share_url = _refuse_to_share
        self._server.gui.configure_theme(dark_mode=True, show_logo=False, show_share_button=False)
        self._server.gui.main_panel.dock_right()
        self._set_initial_camera()
        self._server.on_client_connect(self._connect)
        self._server.on_client_disconnect(self._disconnect)
        threading.Thread(target=self._read_photos, daemon=True, name="photos").start()

    @property
    def host(self) -> str:
        return self._server.get_host()

    @property
    def port(self) -> int:
        return self._server.get_port()

    @property
    def url(self) -> str:
        """Where a browser on this machine finds the viewer."""
        host = self.host
        if is_any_address(host):
            host = "localhost"
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    @property
    def sessions(self) -> dict[int, Session]:
        """The browsers connected now, by viser's client number."""
        with self._lock:
            return dict(self._sessions)

    def wait(self) -> None:
        """Serve until interrupted."""
        self._closed.wait()

    def close(self) -> None:
        """Stop rendering and serving."""
        self._closed.set()
        for session in self.sessions.values():
            session.close()
        self._scheduler.close()
        self._renderer.close()
        with contextlib.redirect_stdout(io.StringIO()):
            self._server.stop()

    def _connect(self, client: Any) -> None:
        self._scheduler.add(client.client_id)
        session = Session(
            client,
            self._scene,
            self._renderer,
            self._scheduler,
            self._frame,
            self._start,
            self._start_view,
            self._shown,
        )
        with self._lock:
            self._sessions[client.client_id] = session
            photos = dict(self._photos)
        for index, photo in photos.items():
            session.frusta.set_photo(index, photo)

    def _disconnect(self, client: Any) -> None:
        with self._lock:
            session = self._sessions.pop(client.client_id, None)
        self._scheduler.remove(client.client_id)
        if session is not None:
            session.close()

    def _deliver(self, client: Any, picture: Picture) -> None:
        session = self.sessions.get(client)
        if session is not None:
            session.show(picture)

    def _complain(self, client: Any, message: str) -> None:
        session = self.sessions.get(client)
        if session is not None:
            session.panel.complain(message)

    def _set_initial_camera(self) -> None:
        """The view that ``Reset View`` returns to; a new browser is there from the start."""
        camera = self._scene.cameras[self._start_view]
        position, look_at, up = self._frame.orbit(pose_of(camera))
        initial = self._server.initial_camera
        initial.position, initial.look_at, initial.up = position, look_at, up
        initial.fov = field_inside_photo(camera, camera.width / camera.height)
        initial.near = 0.01

    def _read_photos(self) -> None:
        """Small copies of the photos for the frusta, while the first picture is being rendered."""
        width, height = self._scene.cameras.size
        share = THUMBNAIL_SIDE / max(width, height)
        size = (max(1, round(width * share)), max(1, round(height * share)))
        K = self._scene.resized(size).cameras.K
        for index in self._shown:
            if self._closed.is_set():
                return
            try:
                image = self._scene.photos[index].read_thumbnail(K[index], size)
            except InputError:  # a frustum without a photo; rendering from this view will say what is wrong
                continue
            photo = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
            with self._lock:
                self._photos[index] = photo
                sessions = list(self._sessions.values())
            for session in sessions:
                session.frusta.set_photo(index, photo)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_any_address(host: str) -> bool:
    """Whether the address stands for all of this machine's."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return host == ""


def check_address(host: str, port: int) -> None:
    """viser would try a thousand ports at an address that this machine does not have, and then wait for ever.

    Raises:
        InputError: not a port, or not an address of this machine.
    """
    if not 0 <= port <= 65535:
        raise InputError(f"expected --port from 0 to 65535, got {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host or None, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
    except OSError as error:
        raise InputError(f"cannot listen on --host {host}: {error.strerror or error}; use 127.0.0.1") from None


def _refuse_to_share(verbose: bool = True) -> None:
    """What a browser's request for a public address gets."""
    del verbose
