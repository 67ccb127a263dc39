"""The encoder: windows and masks against naive references; padding, batches, pairs, chunks; alignment."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from idnerf.models import cross_view_transformer, gmflow
from idnerf.models.cross_view_transformer import WindowAttention, window_edges, window_positions
from idnerf.models.gmflow import CELL_OFFSET, Backbone, GMFlowEncoder, Upsampler, view_pairs


@pytest.fixture
def encoder(generator) -> GMFlowEncoder:
    torch.manual_seed(0)
    return GMFlowEncoder(channels=16, layers=2)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.booleans())
def test_windows_cover_a_side_without_overlap(splits, window, shifted):
    size = splits * window
    edges = window_edges(size, splits, shifted)
    assert edges[0] == 0 and edges[-1] == size and edges == sorted(set(edges))
    lengths = [b - a for a, b in pairwise(edges)]
    assert max(lengths) <= window
    if not shifted or window == 1:
        assert lengths == [window] * splits
    else:
        assert edges[1:-1] == [window // 2 + i * window for i in range(splits)]


@pytest.mark.parametrize("size", [(4, 6), (2, 2), (6, 4)])
def test_shifted_windows_are_the_published_rolled_and_masked_ones(size, generator):
    """Rolled by half a window; 100 is taken from the scores of cells that share a window only because of that."""
    torch.manual_seed(0)
    height, width = size
    attention = WindowAttention(8)
    maps, other = torch.randn(2, 1, height, width, 8, generator=generator).unbind()
    shift = (height // 4, width // 4)

    def window_and_region(position: int, length: int, rolled_by: int) -> tuple[int, int]:
        rolled = (position - rolled_by) % length
        window = length // 2
        return rolled // window, int(rolled >= length - window) + int(rolled >= length - window // 2)

    labels = [
        [(*window_and_region(r, height, shift[0]), *window_and_region(c, width, shift[1])) for c in range(width)]
        for r in range(height)
    ]
    flat = [label for row in labels for label in row]
    queries = attention.query(maps[0]).flatten(0, 1)
    keys, values = attention.key(other[0]).flatten(0, 1), attention.value(other[0]).flatten(0, 1)
    scores = queries @ keys.T / 8**0.5
    for i, (row, region_row, column, region_column) in enumerate(flat):
        for j, (row2, region_row2, column2, region_column2) in enumerate(flat):
            if (row, column) != (row2, column2):
                scores[i, j] = -float("inf")
            elif (region_row, region_column) != (region_row2, region_column2):
                scores[i, j] -= 100
    expected = attention.norm(attention.merge(scores.softmax(-1) @ values)).unflatten(0, size)
    ours = attention(attention.query(maps), attention.key_value(other), 2, shifted=True)
    torch.testing.assert_close(ours[0], expected, atol=1e-5, rtol=1e-5)


def test_window_attention_equals_a_loop_over_cells(generator):
    torch.manual_seed(0)
    attention = WindowAttention(8)
    maps, other = torch.randn(2, 1, 4, 4, 8, generator=generator).unbind()
    ours = attention(attention.query(maps), attention.key_value(other), 2, shifted=False)
    for row, column in [(0, 0), (1, 3), (2, 1), (3, 3)]:
        r, c = row // 2 * 2, column // 2 * 2
        window = other[0, r : r + 2, c : c + 2].reshape(4, 8)
        scores = attention.key(window) @ attention.query(maps[0, row, column]) / 8**0.5
        message = attention.norm(attention.merge(scores.softmax(0) @ attention.value(window)))
        torch.testing.assert_close(ours[0, row, column], message, atol=1e-5, rtol=1e-5)


def test_position_code_tells_every_cell_of_a_window_apart():
    code = window_positions(5, 7, 16, torch.device("cpu")).reshape(35, 16)
    distance = torch.cdist(code, code) + torch.eye(35)
    assert distance.min() > 0.05
    assert code.abs().max() <= 1


@pytest.mark.parametrize("size", [(70, 50), (16, 16), (9, 33)])
@torch.no_grad()
def test_any_image_size_equals_the_image_padded_by_hand(size, encoder, generator):
    width, height = size
    images = torch.rand(1, 2, 3, height, width, generator=generator)
    maps = encoder(images)
    columns = torch.arange(-(-width // 16) * 16).clamp_max(width - 1)
    rows = torch.arange(-(-height // 16) * 16).clamp_max(height - 1)
    by_hand = encoder(images[..., rows[:, None], columns[None]])
    assert maps.padded_size == (len(columns), len(rows)) == by_hand.padded_size
    for ours, theirs, stride in zip(maps.scales, by_hand.scales, (8, 4), strict=True):
        assert ours.shape == (1, 1, 2, len(rows) // stride, len(columns) // stride, 16)
        torch.testing.assert_close(ours, theirs)


@torch.no_grad()
def test_a_pair_does_not_know_of_the_other_views_nor_of_the_batch(encoder, generator):
    images = torch.rand(2, 4, 3, 32, 48, generator=generator)
    maps = encoder(images)
    for index, (first, second) in enumerate(view_pairs(4)):
        alone = encoder(images[1:, [first, second]])
        swapped = encoder(images[1:, [second, first]])
        for of_all, of_pair, of_swapped in zip(maps.scales, alone.scales, swapped.scales, strict=True):
            torch.testing.assert_close(of_all[1:, index], of_pair[:, 0], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(of_pair, of_swapped.flip(2), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_small_chunks_change_nothing(encoder, generator, monkeypatch):
    images = torch.rand(1, 3, 3, 32, 48, generator=generator)
    whole = encoder(images)
    monkeypatch.setattr(gmflow, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(cross_view_transformer, "FEED_FORWARD_ELEMENTS", 500)
    for ours, theirs in zip(encoder(images).scales, whole.scales, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_partner_view_changes_the_features(encoder, generator):
    images = torch.rand(1, 2, 3, 32, 48, generator=generator)
    other = torch.cat([images[:, :1], torch.rand(1, 1, 3, 32, 48, generator=generator)], 1)
    before, after = encoder(images).coarse[:, 0, 0], encoder(other).coarse[:, 0, 0]
    assert (before - after).abs().max() > 0.1


@pytest.mark.parametrize("scale", ["coarse", "fine"])
@torch.no_grad()
def test_a_cell_describes_the_pixels_that_the_cell_offset_says(scale, generator):
    """The centroid of what a changed pixel changes in the features, over random networks."""
    errors = []
    for seed, pixel in [(0, 48), (0, 55), (1, 52), (1, 59), (2, 57), (2, 62)]:
        torch.manual_seed(seed)
        backbone, upsampler = Backbone(), Upsampler(128)
        image = torch.rand(1, 3, 112, 112, generator=generator)
        changed = image.clone()
        changed[..., pixel, pixel] += 3
        maps = [backbone(image), backbone(changed)]
        stride = 8
        if scale == "fine":
            maps, stride = [upsampler(m) for m in maps], 4
        change = (maps[1] - maps[0]).square().sum((0, 1))
        change = torch.where(change > 0.01 * change.max(), change, 0.0).sum(0)
        centroid = (change * (torch.arange(len(change)) + 0.5)).sum() / change.sum()
        errors.append(stride * centroid - CELL_OFFSET - (pixel + 0.5))
    assert torch.stack(errors).mean().abs() < 0.75
