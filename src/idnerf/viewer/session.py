"""One browser: its camera, its panel, what it sees. Knows viser only by the handle it is given."""

import io
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

from idnerf.data.scene import Scene
from idnerf.errors import InputError
from idnerf.viewer.panel import Choices, Panel, on_user
from idnerf.viewer.path_editor import PathEditor, RenderFrame
from idnerf.viewer.photo_frusta import PhotoFrusta
from idnerf.viewer.picture import Picture, display
from idnerf.viewer.render_queue import Level
from idnerf.viewer.scene_renderer import SceneRenderer, ViewRequest
from idnerf.viewer.scheduler import RenderScheduler
from idnerf.viewer.sources import choose_sources
from idnerf.viewer.view_point import ViewPoint, field_inside_photo, pose_of
from idnerf.viewer.world_frame import WorldFrame

JPEG_QUALITY = 90


@dataclass(frozen=True)
class Fitted:
    """A photo's view that the browser was sent to.

    Attributes:
        index: the view.
        aspect: of the window then.
        fields: vertical fields of view (radians) that were set for it, one for each shape the window has had.
    """

    index: int
    aspect: float
    fields: list[float]


class Session:
    """What belongs to one connected browser.

    Args:
        client: viser's ``ClientHandle``.
        scene, renderer, scheduler, frame: shared by all browsers.
        start: what the panel starts with.
        start_view: index of the view that the browser starts at.
        shown: views that get a frustum.
    """

    def __init__(
        self,
        client: Any,
        scene: Scene,
        renderer: SceneRenderer,
        scheduler: RenderScheduler,
        frame: WorldFrame,
        start: Choices,
        start_view: int,
        shown: list[int],
    ):
        self.client, self.scene = client, scene
        self._renderer, self._scheduler, self._frame = renderer, scheduler, frame
        self._lock = threading.RLock()
        self._picture: Picture | None = None
        self._asked: tuple[Any, ...] | None = None
        self._sources: tuple[int, ...] | None = None
        self._fitted: Fitted | None = None
        self.panel = Panel(
            client.gui, scene, start, render=self.ask, redraw=self.draw, go_to=self.go_to_view, start_view=start_view
        )
        self.frusta = PhotoFrusta(client.scene, frame, scene.cameras, shown, self.go_to_view)
        self.path = PathEditor(
            client,
            frame,
            self.frusta.scale,
            here=self.view_point,
            go=self.go,
            prepare=self.frame_renderer,
            name=scene.name,
        )
        with client.gui.add_folder("Save"):
            client.gui.add_button("Save PNG").on_click(lambda _: self._in_thread(self.save_png))
        on_user(self.panel.fov, self._set_field)
        on_user(self.panel.show_photos, self.moved)
        self.go_to_view(start_view)
        client.camera.on_update(lambda _: self.moved())

    def moved(self) -> None:
        """The browser's camera, or its window, has changed."""
        with self._lock:
            if self._fitted is not None and abs(self.client.camera.aspect / self._fitted.aspect - 1) > 0.01:
                self._fit_again(self._fitted)
            position = np.asarray(self.client.camera.position)
            self.frusta.look_from(position, self.panel.show_photos.value)
            self.path.look_from(position)
            self.ask()

    def ask(self) -> None:
        """Ask for the picture that the browser should show now, unless it has already been asked for."""
        with self._lock:
            view = self.view_point()
            try:
                request = self.request(view, self._sources)
            except InputError as error:
                self.panel.complain(str(error))
                return
            self._sources = request.sources
            asked = (view.c2w.round(9).tobytes(), view.fov, view.aspect, request.sources, request.full_side)
            if asked != self._asked:
                self._asked = asked
                self._scheduler.show(self.client.client_id, request)

    def request(self, view: ViewPoint, previous: tuple[int, ...] | None) -> ViewRequest:
        """A view with the sources and the resolution that the panel says."""
        panel = self.panel
        sources = panel.fixed_sources()
        if sources is None:
            left_out = panel.left_out_index
            count = min(panel.count.value, len(self.scene) - (left_out is not None))
            target = view.camera((16, 16), 1.0, 2.0)
            sources = choose_sources(self.scene.cameras, target, count, left_out=left_out, previous=previous)
        if len(sources) < 2:
            raise InputError("this scene has too few photos to leave one out")
        return ViewRequest(view, sources, panel.full_side)

    def show(self, picture: Picture) -> None:
        """A picture has been rendered."""
        with self._lock:
            self._picture = picture
            self.draw()
            self.panel.describe(picture)
            self.frusta.mark(picture.sources)

    def draw(self) -> None:
        """Show the picture at hand as the panel says."""
        with self._lock:
            if self._picture is not None:
                image = display(self._picture, self.panel.shown_mode, fade=self.panel.fade.value)
                self.client.scene.set_background_image(image, format="jpeg", jpeg_quality=JPEG_QUALITY)

    def view_point(self) -> ViewPoint:
        """Where the browser looks from, in the scene's world."""
        camera = self.client.camera
        c2w = self._frame.to_scene(np.asarray(camera.wxyz), np.asarray(camera.position))
        return ViewPoint(c2w, float(camera.fov), float(camera.aspect))

    def go(self, view: ViewPoint) -> None:
        """Move the browser's camera."""
        position, look_at, up = self._frame.orbit(view.c2w)
        camera = self.client.camera
        with self.client.atomic():
            camera.position = position
            camera.up_direction = up
            camera.look_at = look_at
            camera.fov = view.fov
        self.panel.fov.value = round(float(np.degrees(view.fov)) * 2) / 2
        self.moved()

    def go_to_view(self, index: int) -> None:
        """Stand where a photo was taken, with as much of its field as fits the window without its edges."""
        self._fit(index, [])

    def frame_renderer(self) -> RenderFrame:
        """Renders frames to save, with the panel's settings of this moment; see ``PathEditor``."""
        request = self.request(self.view_point(), self._sources)
        side = self._renderer.side(request, Level.FULL)
        mode, fade = self.panel.shown_mode, self.panel.fade.value
        previous = request.sources

        def render(view: ViewPoint) -> UInt8[np.ndarray, "height width 3"]:
            nonlocal previous
            wanted = self.request(view, previous)
            previous = wanted.sources
            picture = self._scheduler.submit(self.client.client_id, ViewRequest(view, wanted.sources, side)).result()
            return display(picture, mode, fade=fade)

        return render

    def save_png(self) -> None:
        """Render the view in full and send it to the browser."""
        image = self.frame_renderer()(self.view_point())
        file = io.BytesIO()
        Image.fromarray(image).save(file, format="PNG")
        name = f"{self.scene.name}_{self.panel.shown_mode.lower()}.png"
        self.client.send_file_download(name, file.getvalue(), save_immediately=True)

    def close(self) -> None:
        """The browser has gone."""
        self.path.close()
        self._scheduler.remove(self.client.client_id)

    def _fit(self, index: int, fields: list[float]) -> None:
        camera = self.scene.cameras[index]
        aspect = float(self.client.camera.aspect)
        field = field_inside_photo(camera, aspect)
        self._fitted = Fitted(index, aspect, [*fields, field])
        self.panel.view.value = str(self.scene.view_ids[index])
        self.go(ViewPoint(pose_of(camera), field, aspect))

    def _fit_again(self, fitted: Fitted) -> None:
        """The window has changed its shape, as it does when the panel is laid out: a photo's view still fits it.

        Unless the person has moved on from there. The browser may not have heard of the last field yet.
        """
        here, camera = self.view_point(), self.scene.cameras[fitted.index]
        self._fitted = None
        still = np.abs(here.c2w - pose_of(camera)).max() < 1e-3 * float(camera.near)
        if still and min(abs(here.fov - field) for field in fitted.fields) < 1e-3:
            self._fit(fitted.index, fitted.fields)

    def _set_field(self) -> None:
        self.client.camera.fov = float(np.radians(self.panel.fov.value))
        self.ask()

    def _in_thread(self, action: Callable[[], None]) -> None:
        """Callbacks of the panel must not wait for a rendering."""

        def run() -> None:
            try:
                action()
            except CancelledError:
                return
            except InputError as error:
                self.panel.complain(str(error))

        threading.Thread(target=run, daemon=True, name="save").start()


def central_view(scene: Scene) -> int:
    """The view nearest to the mean camera centre."""
    centers = scene.cameras.centers
    return int(torch.linalg.vector_norm(centers - centers.mean(0), dim=-1).argmin())
