"""The control panel of one browser: what is shown, from which photos, at which resolution."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from idnerf.data.scene import Scene
from idnerf.errors import InputError
from idnerf.viewer.picture import MODES, Mode, Picture, warning
from idnerf.viewer.scene_renderer import SIDES

AUTO = "auto"
MOST_SOURCES = 8


@dataclass(frozen=True)
class Choices:
    """What a browser starts with, from the command line.

    Attributes:
        num_sources: how many of the nearest views are used.
        sources: exactly these views (indices) instead; None to follow the camera.
    """

    num_sources: int = 3
    sources: tuple[int, ...] | None = None


class Panel:
    """Folders View, Sources and Photos.

    Args:
        gui: a client's GUI (viser's ``GuiApi``).
        scene: for the names of its views.
        start: what is chosen at first.
        render: called when another picture is wanted.
        redraw: called when the same picture is to be shown differently.
        go_to: called with a view's index.
        start_view: the view that the browser starts at.
    """

    def __init__(
        self,
        gui: Any,
        scene: Scene,
        start: Choices,
        *,
        render: Callable[[], None],
        redraw: Callable[[], None],
        go_to: Callable[[int], None],
        start_view: int,
    ):
        self._scene = scene
        self.status = gui.add_markdown("*waiting for the first picture*")
        with gui.add_folder("View"):
            self.mode = gui.add_dropdown("Show", MODES, hint="colour, depth (near red, far blue), or confidence")
            self.fade = gui.add_checkbox("Fade uncertain", True, hint="grey out what the source photos do not support")
            sides = [str(side) for side in SIDES if side <= max(scene.cameras.size)] or [str(max(scene.cameras.size))]
            self.side = gui.add_dropdown(
                "Resolution", [AUTO, *sides], hint="longer side of the picture at rest, pixels"
            )
            self.fov = gui.add_slider("Field of view", 5, 120, 0.5, 50, hint="vertical, degrees")
        with gui.add_folder("Sources"):
            most = min(MOST_SOURCES, len(scene))
            self.follow = gui.add_checkbox(
                "Nearest", start.sources is None, hint="choose the nearest photos anew as the camera moves"
            )
            self.count = gui.add_slider("Number", 2, max(most, 3), 1, min(start.num_sources, most))
            self.fixed = gui.add_text("Views", self.names(start.sources or ()), hint="view numbers such as 0, 3, 7")
            self._enable()
        with gui.add_folder("Photos"):
            self.show_photos = gui.add_checkbox("Show cameras", True)
            self.view = gui.add_dropdown(
                "View", [str(i) for i in scene.view_ids], initial_value=str(scene.view_ids[start_view])
            )
            self.go = gui.add_button("Go to this view")
            self.left_out = gui.add_checkbox("Leave its photo out", False, hint="never use this view as a source")
        for control in (self.mode, self.fade):
            on_user(control, redraw)
        for control in (self.side, self.count, self.left_out, self.view):
            on_user(control, render)
        on_user(self.fixed, lambda: self.follow.value or render())
        on_user(self.follow, lambda: (self._enable(), render()))
        self.go.on_click(lambda _: go_to(self.view_index))

    @property
    def shown_mode(self) -> Mode:
        return cast(Mode, self.mode.value)

    @property
    def full_side(self) -> int | None:
        """Longer side of the picture at rest; None lets the speed decide."""
        return None if self.side.value == AUTO else int(self.side.value)

    @property
    def view_index(self) -> int:
        return self._scene.index_of(int(self.view.value))

    @property
    def left_out_index(self) -> int | None:
        return self.view_index if self.left_out.value else None

    def fixed_sources(self) -> tuple[int, ...] | None:
        """The views typed in, or None when the nearest are wanted.

        Raises:
            InputError: no numbers, unknown views, or fewer than two.
        """
        if self.follow.value:
            return None
        words = self.fixed.value.replace(",", " ").split()
        if not all(word.isdigit() for word in words):
            raise InputError(f"expected view numbers such as 0, 3, 7 in Views; got {self.fixed.value!r}")
        sources = tuple(dict.fromkeys(self._scene.index_of(int(word)) for word in words))
        sources = tuple(i for i in sources if i != self.left_out_index)
        if len(sources) < 2:
            raise InputError(f"expected at least 2 different views in Views; got {self.fixed.value!r}")
        return sources

    def names(self, sources: tuple[int, ...]) -> str:
        """View numbers of indices."""
        return ", ".join(str(self._scene.view_ids[i]) for i in sources)

    def describe(self, picture: Picture) -> None:
        """Say what is shown, and what is wrong with it."""
        width, height = picture.camera.size
        kind = "Full" if picture.full else "Coarse"
        lines = [
            f"**{kind}** {width} x {height}, {picture.seconds:.2f} s",
            f"from views {self.names(picture.sources)}, which support {100 * picture.supported:.0f} %",
        ]
        if concern := warning(picture):
            lines.append(f"**{concern}**")
        self.status.content = "  \n".join(lines)
        if self.follow.value:
            self.fixed.value = self.names(picture.sources)

    def complain(self, message: str) -> None:
        """Say what could not be done."""
        self.status.content = f"**{message}**"

    def _enable(self) -> None:
        self.count.disabled = not self.follow.value
        self.fixed.disabled = self.follow.value


def on_user(control: Any, action: Callable[[], Any]) -> None:
    """Call ``action`` when the person changes a control; values set by the program change nothing."""
    control.on_update(lambda event: action() if event.client is not None else None)
