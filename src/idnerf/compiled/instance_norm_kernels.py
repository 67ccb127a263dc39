"""Inner loops of instance norm on channels-last maps, compiled as those of ``kernels`` are, from the same vectors.

A map is read once for its moments, row by row, so that a row is still in the cache when its deviations are squared, and
once to be written; the backward pass likewise reads twice. ``last_step``: what follows the norm, "none", "relu", or
"residual", ReLU, a sum with another map and ReLU again.
"""

from typing import no_type_check

from idnerf.compiled.kernels import (
    F32,
    add,
    compiled,
    filled,
    larger,
    load,
    multiply,
    scale,
    store,
    subtract,
    where_positive,
)


@compiled
@no_type_check
def row_moments_kernel(channels: int):
    """Of rows [first, last) of a map [row, column, channel]: ``sums`` [row, channel], and sums of ``squares`` of the
    deviations from the row's own mean."""

    @no_type_check
    def kernel(features, columns, first, last, sums, squares):
        for row in range(first, last):
            total = filled(F32(0), channels)
            for pixel in range(row * columns, (row + 1) * columns):
                total = add(total, load(features, pixel * channels, channels))
            store(sums, row * channels, total)
            mean = scale(total, F32(1) / F32(columns))
            total = filled(F32(0), channels)
            for pixel in range(row * columns, (row + 1) * columns):
                apart = subtract(load(features, pixel * channels, channels), mean)
                total = add(total, multiply(apart, apart))
            store(squares, row * channels, total)

    return kernel


@compiled
@no_type_check
def normalize_kernel(channels: int, last_step: str):
    """Pixels [first, last) normalised and the last step taken, into ``out``. ``other``: read with a residual alone."""
    relu, residual = last_step != "none", last_step == "residual"

    @no_type_check
    def kernel(features, mean, inverse_spread, other, first, last, out):
        center, factor, zero = load(mean, 0, channels), load(inverse_spread, 0, channels), filled(F32(0), channels)
        for pixel in range(first, last):
            value = multiply(subtract(load(features, pixel * channels, channels), center), factor)
            if relu:
                value = larger(value, zero)
            if residual:
                value = larger(add(value, load(other, pixel * channels, channels)), zero)
            store(out, pixel * channels, value)

    return kernel


@compiled
@no_type_check
def gradient_sums_kernel(channels: int, last_step: str):
    """Of rows [first, last): sums of the ``gradient`` behind the norm, and of it times the normalised features.

    ``result``: what the forward pass returned. With a residual the other map's gradient is written to ``of_other``.
    """
    relu, residual = last_step != "none", last_step == "residual"

    @no_type_check
    def kernel(features, mean, inverse_spread, result, gradient, columns, first, last, sums, products, of_other):
        center, factor = load(mean, 0, channels), load(inverse_spread, 0, channels)
        for row in range(first, last):
            total, by_value = filled(F32(0), channels), filled(F32(0), channels)
            for pixel in range(row * columns, (row + 1) * columns):
                at = pixel * channels
                value = multiply(subtract(load(features, at, channels), center), factor)
                flow = load(gradient, at, channels)
                if residual:
                    flow = where_positive(load(result, at, channels), flow)
                    store(of_other, at, flow)
                if relu:
                    flow = where_positive(value, flow)
                total = add(total, flow)
                by_value = add(by_value, multiply(flow, value))
            store(sums, row * channels, total)
            store(products, row * channels, by_value)

    return kernel


@compiled
@no_type_check
def norm_gradient_kernel(channels: int, last_step: str):
    """Gradients of the features at pixels [first, last) from their mean and their mean product with the normalised."""
    relu, residual = last_step != "none", last_step == "residual"

    @no_type_check
    def kernel(features, mean, inverse_spread, result, gradient, mean_gradient, mean_product, first, last, out):
        center, factor = load(mean, 0, channels), load(inverse_spread, 0, channels)
        level, slope = load(mean_gradient, 0, channels), load(mean_product, 0, channels)
        for pixel in range(first, last):
            at = pixel * channels
            value = multiply(subtract(load(features, at, channels), center), factor)
            flow = load(gradient, at, channels)
            if residual:
                flow = where_positive(load(result, at, channels), flow)
            if relu:
                flow = where_positive(value, flow)
            store(out, at, multiply(subtract(subtract(flow, level), multiply(value, slope)), factor))

    return kernel
