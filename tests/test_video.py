"""Videos last as long as they should, and a folder of frames holds one run alone."""

import av
import pytest
import torch
from PIL import Image

from idnerf.errors import InputError
from idnerf.video import check_fps, write_frames, write_video


def frames(count: int) -> list[torch.Tensor]:
    return list(torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0)))


def gif_delays(path) -> list[int]:
    """Milliseconds."""
    with Image.open(path) as picture:
        delays = []
        for number in range(picture.n_frames):
            picture.seek(number)
            delays.append(picture.info["duration"])
    return delays


@pytest.mark.parametrize("fps", [0.5, 15.0, 24.0, 29.97, 50.0])
def test_a_gif_lasts_as_long_as_its_frames(tmp_path, fps):
    assert write_video(tmp_path / "a.gif", frames(25), fps) == 25
    delays = gif_delays(tmp_path / "a.gif")
    assert len(delays) == 25 and abs(sum(delays) - 25_000 / fps) <= 5
    assert max(delays) - min(delays) <= 10 and min(delays) >= 20


def test_a_gif_of_one_frame_and_of_frames_alike(tmp_path):
    assert write_video(tmp_path / "a.gif", frames(1), 15.0) == 1
    assert write_video(tmp_path / "b.gif", frames(1) * 7, 24.0) == 7
    assert write_video(tmp_path / "c.gif", [*frames(1) * 6, *frames(2)[1:]], 24.0) == 7
    assert sum(gif_delays(tmp_path / "c.gif")) == 290


@pytest.mark.parametrize(
    ("fps", "suffix"),
    [(0.001, ".gif"), (0.0001, ".mp4"), (0.0, ".mp4"), (float("nan"), ".mp4"), (float("inf"), ".gif"), (60.0, ".gif"),
     (1001.0, ".mp4")],
)  # fmt: skip
def test_frames_per_second_that_cannot_be_are_refused_before_any_work(tmp_path, fps, suffix):
    def never():
        raise AssertionError("a frame was asked for")
        yield

    for refuse in (
        lambda: check_fps(fps, suffix),
        lambda: write_video(tmp_path / "new" / f"a{suffix}", never(), fps),
    ):
        with pytest.raises(InputError, match=r"expected --fps .*from 0.01 to (50|1000), got"):
            refuse()
    assert not (tmp_path / "new").exists()


def test_the_slowest_video_is_as_slow_as_asked(tmp_path):
    check_fps(0.01, "")
    write_video(tmp_path / "a.mp4", frames(2), 0.01)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].average_rate == pytest.approx(0.01)


def pictures(count: int, name: str = "rgb") -> list[dict[str, torch.Tensor]]:
    return [{name: frame} for frame in frames(count)]


def test_frames_of_a_longer_run_are_kept_and_named(tmp_path, capsys):
    folder = tmp_path / "frames"
    assert write_frames(folder, pictures(3)) == write_frames(folder, pictures(3)) == 3
    kept = (folder / "rgb_0002.png").read_bytes()
    assert capsys.readouterr().err == ""
    assert write_frames(folder, ({"rgb": 1 - frame["rgb"]} for frame in pictures(2))) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "frames of an earlier run beyond the 2 of this one, from rgb_0002.png on" in said
    assert (folder / "rgb_0002.png").read_bytes() == kept
    (folder / "photo_1234.png").touch()
    assert write_frames(folder, pictures(4)) == 4 and capsys.readouterr().err == ""
