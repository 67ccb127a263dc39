"""Key frames of a camera path in one browser: set, shown, played, saved as a video."""

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from idnerf.errors import InputError
from idnerf.video import write_video
from idnerf.viewer.path import sample_path
from idnerf.viewer.view_point import ViewPoint
from idnerf.viewer.world_frame import WorldFrame

VIDEO_FPS = 24
PLAY_FPS = 10
COLOUR = (90, 200, 120)

RenderFrame = Callable[[ViewPoint], UInt8[np.ndarray, "height width 3"]]


class PathEditor:
    """Folder Path of a browser's panel.

    Args:
        client: the browser (viser's ``ClientHandle``).
        frame: from the scene's world to the browser's.
        scale: size of a key frame's frustum, viewer units.
        here: gives where the browser looks from.
        go: moves the browser's camera.
        prepare: gives what renders one frame as the browser shows it now: it waits for the frame, and raises
            CancelledError when the browser has gone.
        name: file name of the video, without suffix.
    """

    def __init__(
        self,
        client: Any,
        frame: WorldFrame,
        scale: float,
        *,
        here: Callable[[], ViewPoint],
        go: Callable[[ViewPoint], None],
        prepare: Callable[[], RenderFrame],
        name: str,
    ):
        self.keys: list[ViewPoint] = []
        self._client, self._frame, self._scale = client, frame, scale
        self._here, self._go, self._prepare, self._name = here, go, prepare, name
        self._drawn: list[tuple[Any, Float[np.ndarray, "point 3"]]] = []
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._busy: threading.Thread | None = None
        gui = client.gui
        with gui.add_folder("Path", expand_by_default=False):
            self.state = gui.add_markdown("")
            gui.add_button("Add key frame").on_click(lambda _: self.change(lambda keys: keys.append(self._here())))
            gui.add_button("Remove last").on_click(lambda _: self.change(lambda keys: keys and keys.pop()))
            gui.add_button("Clear").on_click(lambda _: self.change(lambda keys: keys.clear()))
            self.seconds = gui.add_slider("Seconds a leg", 0.5, 10, 0.5, 2)
            self.closed = gui.add_checkbox("Return to start", False)
            self.closed.on_update(lambda _: self.change(lambda keys: None))
            gui.add_button("Play").on_click(lambda _: self.start(self.play))
            gui.add_button("Save MP4").on_click(lambda _: self.start(self.save))
            self.stop_button = gui.add_button("Stop", visible=False)
            self.stop_button.on_click(lambda _: self._stop.set())
            self.progress = gui.add_progress_bar(0, visible=False)
        self._describe()

    def change(self, edit: Callable[[list[ViewPoint]], Any]) -> None:
        """Edit the key frames and draw them anew."""
        with self._lock:
            edit(self.keys)
            self._describe()
            self._draw()

    def start(self, action: Callable[[], None]) -> None:
        """Run ``play`` or ``save`` in a thread of its own, one at a time."""
        with self._lock:
            if self._busy is not None and self._busy.is_alive():
                self.state.content = "*busy: press Stop first*"
                return
            if len(self.keys) < 2:
                self.state.content = "*add at least 2 key frames: move the camera, then Add key frame*"
                return
            self._stop.clear()
            self._busy = threading.Thread(target=self._run, args=(action,), daemon=True, name="path")
            self._busy.start()

    def close(self) -> None:
        """The browser has gone: stop what runs."""
        self._stop.set()

    def frames(self, fps: int) -> list[ViewPoint]:
        """The path at a frame rate."""
        per_leg = max(1, round(self.seconds.value * fps))
        return sample_path(self.keys, per_leg, closed=self.closed.value)

    def play(self) -> None:
        """Move the browser's camera along the path."""
        start = time.monotonic()
        for number, view in enumerate(self.frames(PLAY_FPS)):
            if self._stop.wait(max(0.0, start + number / PLAY_FPS - time.monotonic())):
                return
            self._go(view)

    def save(self) -> None:
        """Render every frame at full quality and send the video to the browser."""
        frames = self.frames(VIDEO_FPS)
        render = self._prepare()

        def pictures() -> Iterator[Any]:
            for number, view in enumerate(frames):
                if self._stop.is_set():
                    raise CancelledError
                yield _as_tensor(render(view))
                self.progress.value = 100 * (number + 1) / len(frames)
                self.state.content = f"frame {number + 1} of {len(frames)}"

        self.progress.visible = True
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{self._name}.mp4"
            write_video(path, pictures(), float(VIDEO_FPS))
            self._client.send_file_download(path.name, path.read_bytes(), save_immediately=True)

    def _run(self, action: Callable[[], None]) -> None:
        self.stop_button.visible = True
        try:
            action()
            self._describe()
        except CancelledError:
            self._describe()
        except InputError as error:
            self.state.content = f"**{error}**"
        finally:
            self.stop_button.visible = False
            self.progress.visible = False
            self.progress.value = 0

    def _describe(self) -> None:
        count = len(self.keys)
        legs = max(0, count if self.closed.value and count > 1 else count - 1)
        self.state.content = f"{count} key frame{'' if count == 1 else 's'}, {legs} leg{'' if legs == 1 else 's'}"

    def look_from(self, position: Float[np.ndarray, "3"]) -> None:
        """Hide what is around the eye: a path goes right through it."""
        with self._lock:
            for handle, points in self._drawn:
                visible = bool(np.linalg.norm(points - position, axis=-1).min() > 2 * self._scale)
                if handle.visible != visible:
                    handle.visible = visible

    def _draw(self) -> None:
        for handle, _ in self._drawn:
            handle.remove()
        self._drawn = []
        scene = self._client.scene
        for number, key in enumerate(self.keys):
            wxyz, position = self._frame.to_viewer(key.c2w)
            frustum = scene.add_camera_frustum(
                f"/path/{number}",
                fov=key.fov,
                aspect=key.aspect,
                scale=0.6 * self._scale,
                thickness=0.03 * self._scale,
                color=COLOUR,
                wxyz=wxyz,
                position=position,
                cast_shadow=False,
                receive_shadow=False,
            )
            self._drawn.append((frustum, position[None]))
        if len(self.keys) > 1:
            along = sample_path(self.keys, 12, closed=self.closed.value)
            points = np.array([self._frame.to_viewer(view.c2w)[1] for view in along])
            ends = points if not self.closed.value else np.concatenate([points, points[:1]])
            segments = np.stack([ends[:-1], ends[1:]], 1)
            line = scene.add_line_segments("/path/line", segments, COLOUR, thickness=0.03 * self._scale)
            self._drawn.append((line, points))
        self.look_from(np.asarray(self._client.camera.position))


def _as_tensor(picture: UInt8[np.ndarray, "height width 3"]) -> Float[Tensor, "3 height width"]:
    """8-bit RGB as the [0, 1] channels-first tensor that videos are written from."""
    return torch.from_numpy(picture).permute(2, 0, 1).float() / 255
