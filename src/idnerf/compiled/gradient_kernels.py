"""The inner loops of a training step's backward pass, compiled as those of ``kernels`` are, from the same vectors.

Nothing is kept from the forward pass but its inputs: points are looked up again.
"""

from typing import no_type_check

import numpy as np

from idnerf.compiled.kernels import (
    F32,
    add,
    add_scaled,
    compiled,
    divide,
    filled,
    group_sums,
    in_cells,
    in_map,
    in_volume,
    larger,
    load,
    multiply,
    repeated,
    scale,
    square_root,
    store,
    subtract,
    where_equal,
)


@compiled
@no_type_check
def match_gradient_kernel(channels: int, groups: int, colours: int, only_similarity: bool):
    """From gradients of what ``match_kernel`` writes to gradients of the features that it looks up, without colours.

    Points [first, last) of [sample, pixel], counted from ``start``; ``of_values`` [view, point, value] may be one
    number, for none. ``out`` [view, point, channel] holds ``count`` points from ``start`` on. Where several pairs of
    views are equally similar, and most, they share the gradient of the best equally (PyTorch halves it at every pair).
    """
    values_count = channels + colours
    coloured = colours > 0
    cues_count = 2 * groups + (0 if only_similarity else values_count + (colours if coloured else groups + 2))
    run = channels // groups

    @no_type_check
    def kernel(
        maps, views, height, width, rays, origins, inverse_depths, pixels, per_pixel, photo_width, photo_height,
        map_scale, points, of_cues, of_agreement, of_values, start, count, first, last, out,
    ):  # fmt: skip
        right = values_count if width > 1 else 0
        below = width * values_count if height > 1 else 0
        kept = of_values.size > 1
        buffer = np.empty(views * channels, F32)
        gradients = np.empty(views * channels, F32)
        similarities = np.empty(views * views * groups, F32)
        sees = np.empty(views, np.bool_)
        for point in range(start + first, start + last):
            sample = point // pixels
            pixel = point - sample * pixels
            inverse_depth = inverse_depths[point if per_pixel else sample]
            seen = 0
            for view in range(views):
                inside, left, top, fu, fv = in_map(
                    rays, origins, view, pixels, pixel, inverse_depth, photo_width, photo_height, map_scale,
                    width, height,
                )  # fmt: skip
                sees[view] = inside
                seen += inside
                at = ((view * height + top) * width + left) * values_count
                row = scale(load(maps, at, channels), (F32(1) - fu) * (F32(1) - fv))
                row = add_scaled(row, load(maps, at + right, channels), fu * (F32(1) - fv))
                row = add_scaled(row, load(maps, at + below, channels), (F32(1) - fu) * fv)
                row = add_scaled(row, load(maps, at + right + below, channels), fu * fv)
                store(buffer, view * channels, row)
                if kept:
                    store(gradients, view * channels, load(of_values, (view * points + point) * values_count, channels))
                else:
                    store(gradients, view * channels, filled(F32(0), channels))
            best = filled(F32(-1e30), groups)
            pairs = 0
            for one in range(views):
                if sees[one]:
                    mine = load(buffer, one * channels, channels)
                    for other in range(one + 1, views):
                        if sees[other]:
                            similarity = group_sums(multiply(mine, load(buffer, other * channels, channels)), groups)
                            store(similarities, pairs * groups, similarity)
                            best = larger(similarity, best)
                            pairs += 1
            if pairs:
                at = point * cues_count
                of_all = add(load(of_cues, at, groups), filled(of_agreement[point] / F32(groups), groups))
                of_all = scale(of_all, F32(1) / F32(pairs))
                of_best = load(of_cues, at + groups, groups)
                one_each, ties = filled(F32(1), groups), filled(F32(0), groups)
                for pair in range(pairs):
                    ties = add(ties, where_equal(load(similarities, pair * groups, groups), best, one_each))
                of_best = divide(of_best, larger(ties, one_each))
                pairs = 0
                for one in range(views):
                    if sees[one]:
                        mine = load(buffer, one * channels, channels)
                        of_mine = load(gradients, one * channels, channels)
                        for other in range(one + 1, views):
                            if sees[other]:
                                similarity = load(similarities, pairs * groups, groups)
                                pairs += 1
                                share = repeated(add(of_all, where_equal(similarity, best, of_best)), run)
                                theirs = load(buffer, other * channels, channels)
                                of_mine = add(of_mine, multiply(share, theirs))
                                of_theirs = add(load(gradients, other * channels, channels), multiply(share, mine))
                                store(gradients, other * channels, of_theirs)
                        store(gradients, one * channels, of_mine)
            if not only_similarity:
                at = point * cues_count + 2 * groups
                share = F32(1) / F32(seen if seen else views)
                of_mean = load(of_cues, at, channels)
                if coloured:
                    for view in range(views):
                        if sees[view] or seen == 0:
                            total = add_scaled(load(gradients, view * channels, channels), of_mean, share)
                            store(gradients, view * channels, total)
                else:
                    mean = filled(F32(0), channels)
                    for view in range(views):
                        if sees[view] or seen == 0:
                            mean = add_scaled(mean, load(buffer, view * channels, channels), share)
                    of_spread = repeated(load(of_cues, at + channels, groups), run)
                    for view in range(views):
                        if sees[view] or seen == 0:
                            apart = subtract(load(buffer, view * channels, channels), mean)
                            change = add(of_mean, scale(multiply(apart, of_spread), F32(2)))
                            total = add_scaled(load(gradients, view * channels, channels), change, share)
                            store(gradients, view * channels, total)
            for view in range(views):
                store(out, (view * count + point - start) * channels, load(gradients, view * channels, channels))

    return kernel


@compiled
@no_type_check
def spread_kernel(channels: int, values_count: int):
    """Adds gradients of looked-up features [view, point, channel] to those of the maps, for views [first, last).

    Points are ``count`` from ``start`` on; ``out`` [view, row, column, value] takes the first ``channels`` values.
    """

    @no_type_check
    def kernel(
        gradients, height, width, rays, origins, inverse_depths, pixels, per_pixel, photo_width, photo_height,
        map_scale, start, count, first, last, out,
    ):  # fmt: skip
        right = values_count if width > 1 else 0
        below = width * values_count if height > 1 else 0
        for view in range(first, last):
            for number in range(count):
                point = start + number
                sample = point // pixels
                pixel = point - sample * pixels
                inverse_depth = inverse_depths[point if per_pixel else sample]
                _, left, top, fu, fv = in_map(
                    rays, origins, view, pixels, pixel, inverse_depth, photo_width, photo_height, map_scale,
                    width, height,
                )  # fmt: skip
                row = load(gradients, (view * count + number) * channels, channels)
                at = ((view * height + top) * width + left) * values_count
                store(out, at, add_scaled(load(out, at, channels), row, (F32(1) - fu) * (F32(1) - fv)))
                at += right
                store(out, at, add_scaled(load(out, at, channels), row, fu * (F32(1) - fv)))
                at += below - right
                store(out, at, add_scaled(load(out, at, channels), row, (F32(1) - fu) * fv))
                at += right
                store(out, at, add_scaled(load(out, at, channels), row, fu * fv))

    return kernel


@compiled
@no_type_check
def unit_length_gradient_kernel(channels: int, groups: int, colours: int, halves: bool):
    """Gradients of the centred features of pixels [first, last), from those of what ``unit_length_kernel`` writes."""
    run = channels // groups

    @no_type_check
    def kernel(features, mean, gradients, first, last, out):
        center = load(mean, 0, channels)
        for pixel in range(first, last):
            apart = subtract(load(features, pixel * channels, channels), center)
            squares = add(group_sums(multiply(apart, apart), groups), filled(F32(1e-6), groups))
            length = repeated(square_root(squares), run)
            unit = divide(apart, length)
            gradient = load(gradients, pixel * (channels + colours), channels)
            along = repeated(group_sums(multiply(unit, gradient), groups), run)
            store(out, pixel * channels, divide(subtract(gradient, multiply(unit, along)), length))

    return kernel


@compiled
@no_type_check
def voxel_gradient_kernel(channels: int):
    """Adds gradients [point, channel] of what ``voxel_kernel`` finds at points [first, last) to those of its volume."""

    @no_type_check
    def kernel(gradients, planes, height, width, cells, positions, pixels, first, last, out):
        right = channels if width > 1 else 0
        down = width * channels if height > 1 else 0
        for point in range(first, last):
            left, top, plane, fu, fv, fw = in_volume(cells, positions, point, point % pixels, planes, height, width)
            at = ((plane * height + top) * width + left) * channels
            behind = height * width * channels if plane < planes - 1 else 0
            row = load(gradients, point * channels, channels)
            for step in range(2):
                share = fw if step else F32(1) - fw
                above, under = share * (F32(1) - fv), share * fv
                store(out, at, add_scaled(load(out, at, channels), row, (F32(1) - fu) * above))
                store(out, at + right, add_scaled(load(out, at + right, channels), row, fu * above))
                store(out, at + down, add_scaled(load(out, at + down, channels), row, (F32(1) - fu) * under))
                corner = at + right + down
                store(out, corner, add_scaled(load(out, corner, channels), row, fu * under))
                at += behind

    return kernel


@compiled
@no_type_check
def pair_gradient_kernel(channels: int, groups: int):
    """Adds gradients of the maps of the pairs [first, last) to ``out``, given those of what ``pair_kernel`` writes.

    With m and t looked up and s = m t / |m| |t|, that of m is t / |m| |t| - s m / |m|^2, in every group of channels.
    """
    run = channels // groups

    @no_type_check
    def kernel(maps, views, height, width, positions, weights, points, of_cues, first, last, out):
        right = channels if width > 1 else 0
        below = width * channels if height > 1 else 0
        map_size = height * width * channels
        smallest, tiny = filled(F32(1e-16), groups), filled(F32(1e-30), groups)
        pair = -1
        for one in range(views):
            for other in range(one + 1, views):
                pair += 1
                if pair < first or pair >= last:
                    continue
                for point in range(points):
                    weight = weights[pair * points + point]
                    if weight == 0:
                        continue
                    left, top, fu, fv = in_cells(positions, one * points + point, width, height)
                    a, b, c, d = (F32(1) - fu) * (F32(1) - fv), fu * (F32(1) - fv), (F32(1) - fu) * fv, fu * fv
                    at = 2 * pair * map_size + (top * width + left) * channels
                    mine = scale(load(maps, at, channels), a)
                    mine = add_scaled(mine, load(maps, at + right, channels), b)
                    mine = add_scaled(mine, load(maps, at + below, channels), c)
                    mine = add_scaled(mine, load(maps, at + right + below, channels), d)
                    left, top, fu, fv = in_cells(positions, other * points + point, width, height)
                    e, f, g, h = (F32(1) - fu) * (F32(1) - fv), fu * (F32(1) - fv), (F32(1) - fu) * fv, fu * fv
                    there = (2 * pair + 1) * map_size + (top * width + left) * channels
                    theirs = scale(load(maps, there, channels), e)
                    theirs = add_scaled(theirs, load(maps, there + right, channels), f)
                    theirs = add_scaled(theirs, load(maps, there + below, channels), g)
                    theirs = add_scaled(theirs, load(maps, there + right + below, channels), h)
                    of_mine = group_sums(multiply(mine, mine), groups)
                    of_theirs = group_sums(multiply(theirs, theirs), groups)
                    squares = multiply(of_mine, of_theirs)
                    bounded = larger(squares, smallest)
                    similarity = divide(group_sums(multiply(mine, theirs), groups), square_root(bounded))
                    given = scale(load(of_cues, point * groups, groups), weight)
                    across = repeated(divide(given, square_root(bounded)), run)
                    # lengths have a gradient where they are not bounded
                    along = where_equal(squares, bounded, multiply(given, similarity))
                    along_mine = repeated(divide(along, larger(of_mine, tiny)), run)
                    along_theirs = repeated(divide(along, larger(of_theirs, tiny)), run)
                    row = subtract(multiply(across, theirs), multiply(along_mine, mine))
                    store(out, at, add_scaled(load(out, at, channels), row, a))
                    store(out, at + right, add_scaled(load(out, at + right, channels), row, b))
                    store(out, at + below, add_scaled(load(out, at + below, channels), row, c))
                    at += right + below
                    store(out, at, add_scaled(load(out, at, channels), row, d))
                    row = subtract(multiply(across, mine), multiply(along_theirs, theirs))
                    store(out, there, add_scaled(load(out, there, channels), row, e))
                    store(out, there + right, add_scaled(load(out, there + right, channels), row, f))
                    store(out, there + below, add_scaled(load(out, there + below, channels), row, g))
                    there += right + below
                    store(out, there, add_scaled(load(out, there, channels), row, h))

    return kernel
