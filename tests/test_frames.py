"""Frames at once: the same pictures in the same order, and threads as they were."""

import threading

import pytest
import torch

from idnerf.models.idnerf import IDNeRF
from idnerf.rendering.frames import MOST_FRAMES, frames_at_once, made_at_once
from tiny_cases import TINY_MODELS, tiny_example, waken


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_frames_come_in_order_and_overlap(four_threads):
    """The first two wait for one another: one after the other, the first would wait in vain."""
    together = threading.Barrier(2, timeout=60)

    def make(number: int) -> tuple[int, int]:
        if number < 2:
            together.wait()
        return number, torch.get_num_threads()

    made = list(made_at_once(8, make))
    assert [number for number, _ in made] == list(range(8))
    assert {threads for _, threads in made} == {1}
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize(
    ("count", "threads", "frames"),
    [(9, 1, 1), (9, 2, 2), (9, 6, 3), (9, 7, 3), (9, 8, 4), (9, 16, 4), (2, 8, 2), (1, 8, 1)],
)
def test_frames_leave_few_threads_idle(count, threads, frames):
    assert frames_at_once(count, threads) == frames


def test_no_more_frames_are_held_than_are_made_at_once(four_threads):
    begun = []
    frames = made_at_once(100, lambda number: begun.append(number))
    next(frames)
    frames.close()
    assert len(begun) <= MOST_FRAMES + 2
    assert torch.get_num_threads() == 4


def test_an_error_reaches_the_caller(four_threads):
    def make(number: int) -> int:
        if number == 2:
            raise ValueError("frame 2")
        return number

    frames = made_at_once(5, make)
    assert [next(frames), next(frames)] == [0, 1]
    with pytest.raises(ValueError, match="frame 2"):
        list(frames)
    assert torch.get_num_threads() == 4


def test_one_thread_and_graphics_cards_make_one_frame_at_a_time(four_threads):
    here = threading.get_ident()
    assert set(made_at_once(3, lambda _: threading.get_ident(), "cuda")) == {here}
    torch.set_num_threads(1)
    assert set(made_at_once(3, lambda _: threading.get_ident())) == {here}


def test_pictures_are_those_of_one_frame_at_a_time(four_threads):
    torch.manual_seed(0)
    model = waken(IDNeRF(TINY_MODELS["cascade"])).eval()
    example = tiny_example(size=(24, 20))
    features = model.encode(example.source[None])
    targets = example.source.cameras

    def make(number: int) -> torch.Tensor:
        return model.render_target(features, targets[number][None]).rgb

    for a, b in zip(made_at_once(len(targets), make), map(make, range(len(targets))), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
