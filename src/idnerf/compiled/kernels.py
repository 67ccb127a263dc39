"""The inner loops of both configurations, compiled for the processor at hand by numba (the extra `cpu`).

What PyTorch computes in thirty passes over buffers of megabytes, these compute point by point in registers. Their inner
loops are over channels, whose number is known when a kernel is compiled: ``Vector`` is a value of that many float32,
which LLVM maps to the processor's own vectors. Written out because numba's own loops over arrays must assume that one
array may overlap the other, and are several times slower (benchmarks/NOTES.md).

This is the only file that imports numba, and it is imported when the first view is rendered or the first training step
taken. Numba's cache of a kernel is renewed when the file that holds it changes; as other files of kernels take their
vector operations from here, every kernel's name holds a checksum of this file too.
"""

import functools
import math
import pickle
import threading
import warnings
import zlib
from pathlib import Path
from typing import Any, no_type_check

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core.errors import TypingError
from numba.extending import intrinsic, models, register_jitable, register_model

FLAGS = ("contract", "reassoc", "nsz")
"""Freedom given to the compiler: sums in any order and fused multiply-adds, but numbers that are not finite stay so."""
FLOAT, INT = ir.FloatType(), ir.IntType(32)


class Vector(types.Type):
    """``length`` float32 numbers in registers."""

    def __init__(self, length: int):
        self.length = length
        super().__init__(f"Vector({length})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    @no_type_check
    def __init__(self, manager, vector):
        super().__init__(manager, vector, ir.VectorType(FLOAT, vector.length))


def _shuffle(builder: Any, value: Any, lanes: list[int]) -> Any:
    undefined = ir.Constant(value.type, ir.Undefined)
    return builder.shuffle_vector(value, undefined, ir.Constant(ir.VectorType(INT, len(lanes)), lanes))


def _spread(builder: Any, number: Any, length: int) -> Any:
    undefined = ir.Constant(ir.VectorType(FLOAT, length), ir.Undefined)
    return _shuffle(builder, builder.insert_element(undefined, number, INT(0)), [0] * length)


def _constant(number: float, length: int) -> Any:
    return ir.Constant(ir.VectorType(FLOAT, length), [float(np.float32(number))] * length)


def _address(context: Any, builder: Any, array_type: Any, array: Any, index: Any, vector: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())


def _elementwise(build: Any) -> Any:
    """An operation on vectors of one length."""

    @intrinsic
    @no_type_check
    def operation(typing_context, first, second):
        def generate(context, builder, signature, arguments):
            return build(builder, *arguments)

        return first(first, second), generate

    return operation


add = _elementwise(lambda builder, a, b: builder.fadd(a, b, flags=FLAGS))
subtract = _elementwise(lambda builder, a, b: builder.fsub(a, b, flags=FLAGS))
multiply = _elementwise(lambda builder, a, b: builder.fmul(a, b, flags=FLAGS))
divide = _elementwise(lambda builder, a, b: builder.fdiv(a, b, flags=FLAGS))
# where the first is no number, so is the result: a network that diverged must show
larger = _elementwise(lambda builder, a, b: builder.select(builder.fcmp_unordered(">", a, b), a, b))


@intrinsic
@no_type_check
def where_equal(typing_context, first, second, value):
    """Lanes of ``value`` where the other two are the same, 0 elsewhere."""

    def generate(context, builder, signature, arguments):
        same = builder.fcmp_ordered("==", arguments[0], arguments[1])
        return builder.select(same, arguments[2], _constant(0.0, value.length))

    return value(first, second, value), generate


@intrinsic
@no_type_check
def where_positive(typing_context, number, value):
    """Lanes of ``value`` where ``number`` is above 0 or no number, 0 elsewhere: a network that diverged must show."""

    def generate(context, builder, signature, arguments):
        zero = _constant(0.0, value.length)
        return builder.select(builder.fcmp_unordered(">", arguments[0], zero), arguments[1], zero)

    return value(number, value), generate


@intrinsic(prefer_literal=True)
@no_type_check
def load(typing_context, array, index, length):
    """``array[index : index + length]``. An array of uint16 is taken for the upper halves of float32, bfloat16."""
    count = length.literal_value

    def generate(context, builder, signature, arguments):
        halves = array.dtype == types.uint16
        vector = ir.VectorType(ir.IntType(16) if halves else FLOAT, count)
        address = _address(context, builder, signature.args[0], arguments[0], arguments[1], vector)
        value = builder.load(address, align=2 if halves else 4)
        if not halves:
            return value
        wide = ir.VectorType(INT, count)
        value = builder.shl(builder.zext(value, wide), ir.Constant(wide, [16] * count))
        return builder.bitcast(value, ir.VectorType(FLOAT, count))

    return Vector(count)(array, types.intp, length), generate


@intrinsic
@no_type_check
def store(typing_context, array, index, value):
    """``array[index : index + length] = value``, float32."""
    if array.dtype != types.float32:
        raise TypingError(f"vectors are stored as float32, not as {array.dtype}")

    def generate(context, builder, signature, arguments):
        vector = arguments[2].type
        address = _address(context, builder, signature.args[0], arguments[0], arguments[1], vector)
        builder.store(arguments[2], address, align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), generate


@intrinsic(prefer_literal=True)
@no_type_check
def filled(typing_context, number, length):
    """``length`` times the same number."""
    count = length.literal_value

    def generate(context, builder, signature, arguments):
        return _spread(builder, arguments[0], count)

    return Vector(count)(types.float32, length), generate


@intrinsic
@no_type_check
def scale(typing_context, value, number):
    def generate(context, builder, signature, arguments):
        return builder.fmul(arguments[0], _spread(builder, arguments[1], value.length), flags=FLAGS)

    return value(value, types.float32), generate


@intrinsic
@no_type_check
def add_scaled(typing_context, total, value, number):
    """``total + number * value``."""

    def generate(context, builder, signature, arguments):
        scaled = builder.fmul(arguments[1], _spread(builder, arguments[2], value.length), flags=FLAGS)
        return builder.fadd(arguments[0], scaled, flags=FLAGS)

    return value(value, value, types.float32), generate


@intrinsic(prefer_literal=True)
@no_type_check
def group_sums(typing_context, value, groups):
    """Sums of so many runs of equal length."""
    count = groups.literal_value

    def generate(context, builder, signature, arguments):
        total, run = arguments[0], value.length // count
        while run % 2 == 0:  # halves of each run onto one another: the first steps are whole registers
            run //= 2
            low, high = (
                [2 * group * run + start + step for group in range(count) for step in range(run)] for start in (0, run)
            )
            total = builder.fadd(_shuffle(builder, total, low), _shuffle(builder, total, high), flags=FLAGS)
        parts = [_shuffle(builder, total, [group * run + step for group in range(count)]) for step in range(run)]
        return functools.reduce(lambda a, b: builder.fadd(a, b, flags=FLAGS), parts)

    return Vector(count)(value, groups), generate


@intrinsic(prefer_literal=True)
@no_type_check
def lanes(typing_context, value, first, last):
    """``value[first:last]``."""
    start, stop = first.literal_value, last.literal_value

    def generate(context, builder, signature, arguments):
        return _shuffle(builder, arguments[0], list(range(start, stop)))

    return Vector(stop - start)(value, first, last), generate


@intrinsic(prefer_literal=True)
@no_type_check
def repeated(typing_context, value, times):
    """Every lane so many times in a row: what ``group_sums`` took together."""
    count = times.literal_value

    def generate(context, builder, signature, arguments):
        return _shuffle(builder, arguments[0], [lane for lane in range(value.length) for _ in range(count)])

    return Vector(value.length * count)(value, times), generate


@intrinsic
@no_type_check
def square_root(typing_context, value):
    def generate(context, builder, signature, arguments):
        vector, name = arguments[0].type, f"llvm.sqrt.v{value.length}f32"
        root = builder.module.globals.get(name) or ir.Function(builder.module, ir.FunctionType(vector, [vector]), name)
        return builder.call(root, arguments)

    return value(value), generate


def _reduction(build: Any) -> Any:
    """From a vector to one number, by halves."""

    @intrinsic
    @no_type_check
    def operation(typing_context, value):
        def generate(context, builder, signature, arguments):
            parts = [arguments[0]]
            while len(parts) > 1 or parts[0].type.count > 1:
                length = parts[0].type.count
                if length % 2:  # one lane after the other
                    taken = [builder.extract_element(parts[0], INT(lane)) for lane in range(length)]
                    return functools.reduce(lambda a, b: build(builder, a, b), taken)
                half = length // 2
                low, high = (_shuffle(builder, parts[0], list(range(i * half, (i + 1) * half))) for i in (0, 1))
                parts = [build(builder, low, high)]
            return builder.extract_element(parts[0], INT(0))

        return types.float32(value), generate

    return operation


sum_of = _reduction(lambda builder, a, b: builder.fadd(a, b, flags=FLAGS))
largest_of = _reduction(lambda builder, a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b))

LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
EXPONENTIAL = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
"""Of exp(r) = 1 + r + r^2 P(r) for |r| < ln 2 / 2, highest power first (Cephes' expf, relative error 2e-7)."""


@intrinsic
@no_type_check
def exponential(typing_context, value):
    """e to the power of every lane, which are cut off at +-80."""

    def generate(context, builder, signature, arguments):
        length = value.length
        vector, whole = ir.VectorType(FLOAT, length), ir.VectorType(INT, length)

        def constant(number):
            return _constant(number, length)

        x = arguments[0]
        x = builder.select(builder.fcmp_ordered(">", x, constant(80.0)), constant(80.0), x)
        x = builder.select(builder.fcmp_ordered("<", x, constant(-80.0)), constant(-80.0), x)
        # x = n ln 2 + r; adding half and truncating after a shift into the positive is floor
        shifted = builder.fadd(builder.fmul(x, constant(1 / math.log(2))), constant(128.5))
        shifted = builder.select(builder.fcmp_ordered("ord", x, x), shifted, constant(0.0))  # none of no number
        n = builder.sub(builder.fptosi(shifted, whole), ir.Constant(whole, [128] * length))
        as_float = builder.sitofp(n, vector)
        # flags are given, since numba gives all of ``FLAGS`` where there are none, and regrouped these make one step
        exact = ("contract",)
        for part in (LN2_HIGH, LN2_LOW):
            x = builder.fsub(x, builder.fmul(as_float, constant(part), flags=exact), flags=exact)
        r = x
        polynomial = constant(EXPONENTIAL[0])
        for coefficient in EXPONENTIAL[1:]:
            polynomial = builder.fadd(builder.fmul(polynomial, r, flags=FLAGS), constant(coefficient), flags=FLAGS)
        squared = builder.fmul(r, r)
        result = builder.fadd(
            builder.fmul(polynomial, squared, flags=FLAGS), builder.fadd(r, constant(1.0)), flags=FLAGS
        )
        power = builder.shl(builder.add(n, ir.Constant(whole, [127] * length)), ir.Constant(whole, [23] * length))
        return builder.fmul(result, builder.bitcast(power, vector))

    return value(value), generate


HALF_PI_HIGH, HALF_PI_MIDDLE, HALF_PI_LOW = 1.5703125, 4.837512969970703125e-4, 7.549789954891882e-8
SINE = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
COSINE = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2, -0.5)
"""Of sin(r) = r + r^3 P(r^2) and cos(r) = 1 + r^2 P(r^2) for |r| < pi / 4, highest power first (Cephes' sinf, cosf)."""
LARGEST_ANGLE = 8192.0
"""``sine`` is exact to 1e-7 up to here."""


@intrinsic(prefer_literal=True)
@no_type_check
def sine(typing_context, value, quarters):
    """The sine of every lane and so many quarters of a circle."""
    ahead = quarters.literal_value

    def generate(context, builder, signature, arguments):
        length = value.length
        vector, whole = ir.VectorType(FLOAT, length), ir.VectorType(INT, length)

        def constant(number):
            return _constant(number, length)

        def integers(number):
            return ir.Constant(whole, [number] * length)

        def polynomial(coefficients, at):
            result = constant(coefficients[0])
            for coefficient in coefficients[1:]:
                result = builder.fadd(builder.fmul(result, at, flags=FLAGS), constant(coefficient), flags=FLAGS)
            return result

        x = arguments[0]
        # x = n pi/2 + r; truncating after a shift into the positive is floor
        shifted = builder.fadd(builder.fmul(x, constant(2 / math.pi)), constant(8192.5))
        shifted = builder.select(builder.fcmp_ordered("ord", x, x), shifted, constant(0.0))  # none of no number
        n = builder.sub(builder.fptosi(shifted, whole), integers(8192))
        as_float = builder.sitofp(n, vector)
        r = x
        for part in (HALF_PI_HIGH, HALF_PI_MIDDLE, HALF_PI_LOW):
            r = builder.fsub(r, builder.fmul(as_float, constant(part), flags=("contract",)), flags=("contract",))
        squared = builder.fmul(r, r)
        cubed = builder.fmul(squared, r)
        of_sine = builder.fadd(builder.fmul(polynomial(SINE, squared), cubed, flags=FLAGS), r, flags=FLAGS)
        of_cosine = builder.fmul(polynomial(COSINE, squared), squared, flags=FLAGS)
        of_cosine = builder.fadd(of_cosine, constant(1.0), flags=FLAGS)
        n = builder.add(n, integers(ahead))
        odd = builder.icmp_signed("!=", builder.and_(n, integers(1)), integers(0))
        sign = builder.shl(builder.and_(n, integers(2)), integers(30))
        result = builder.bitcast(builder.select(odd, of_cosine, of_sine), whole)
        return builder.bitcast(builder.xor(result, sign), vector)

    return value(value, quarters), generate


CHECKSUM = f"{zlib.crc32(Path(__file__).read_bytes()):08x}"
"""Of this file."""
_MADE: dict[tuple[Any, ...], Any] = {}
_LOCK = threading.Lock()


def compiled(factory: Any) -> Any:
    """A factory's kernels: for every choice of sizes one, compiled when it is first called, without Python's lock.

    Every one has a file of its own in numba's cache: numba writes an index of several without a lock, and two processes
    that compile at once could each be handed the other's kernel, for other sizes.
    """

    @functools.wraps(factory)
    def get(*sizes: Any) -> Any:
        key = (factory.__name__, *sizes)
        with _LOCK:
            if key not in _MADE:
                function = factory(*sizes)
                function.__qualname__ = "_".join(map(str, (*key, CHECKSUM))).replace(".", "p")
                _MADE[key] = _kept(function)
        return _MADE[key]

    return get


def _kept(function: Any) -> Any:
    """Compiled, and kept on disk where there is a place for it."""
    options = {"nogil": True, "fastmath": set(FLAGS), "error_model": "numpy"}
    try:
        kept = njit(**options, cache=True)(function)
    except RuntimeError:  # neither beside this file nor in the user's cache folder
        return njit(**options)(function)
    anew = njit(**options)(function)
    usable = True

    @functools.wraps(function)
    def call(*arguments: Any) -> None:
        nonlocal usable
        if usable:
            try:
                return kept(*arguments)
            except (OSError, EOFError, pickle.UnpicklingError) as error:  # a full disk, a file cut short
                usable = False
                folder = kept.stats.cache_path
                warnings.warn(f"compiling anew, for the cache in {folder} is not usable: {error}", stacklevel=2)
        return anew(*arguments)

    return call


F32 = np.float32
inlined = register_jitable
"""A function that kernels may call."""


@compiled
@no_type_check
def row_sum_kernel(channels: int, halves: bool):
    """Sums of the rows [first, last) of a map [row, column, channel]: ``sums`` [row, channel].

    ``halves``: here as below, what may be bfloat16 is, as uint16. Told for its own file in the cache.
    """

    @no_type_check
    def kernel(features, columns, first, last, sums):
        for row in range(first, last):
            total = filled(F32(0), channels)
            for pixel in range(row * columns, (row + 1) * columns):
                total = add(total, load(features, pixel * channels, channels))
            store(sums, row * channels, total)

    return kernel


@compiled
@no_type_check
def unit_length_kernel(channels: int, groups: int, colours: int, halves: bool):
    """Features of pixels [first, last) centred and scaled to unit length by group, then their colour, into ``out``."""
    run = channels // groups

    @no_type_check
    def kernel(features, mean, colour, first, last, out):
        center = load(mean, 0, channels)
        for pixel in range(first, last):
            apart = subtract(load(features, pixel * channels, channels), center)
            squares = add(group_sums(multiply(apart, apart), groups), filled(F32(1e-6), groups))
            unit = divide(apart, repeated(square_root(squares), run))
            at = pixel * (channels + colours)
            store(out, at, unit)
            for number in range(colours):
                out[at + channels + number] = colour[pixel * colours + number]

    return kernel


@inlined
@no_type_check
def on_photo(x, y, z, width, height):
    """Of a homogeneous point: whether a photo shows it, its (u, v), and z kept away from zero."""
    safe = max(z, F32(1e-6)) if z >= 0 else min(z, F32(-1e-6))
    u, v = x / safe, y / safe
    return z > 0 and u >= 0 and u < width and v >= 0 and v < height, u, v, safe


@inlined
@no_type_check
def in_map(rays, origins, view, pixels, pixel, inverse_depth, photo_width, photo_height, map_scale, width, height):
    """Where a point lies in a view's map: whether the photo shows it, left column, top row, how far beyond their
    centres."""
    ray, origin = 3 * (view * pixels + pixel), 3 * view
    x = rays[ray] + origins[origin] * inverse_depth
    y = rays[ray + 1] + origins[origin + 1] * inverse_depth
    z = rays[ray + 2] + origins[origin + 2] * inverse_depth
    inside, u, v, _ = on_photo(x, y, z, photo_width, photo_height)
    u, v = u / map_scale - F32(0.5), v / map_scale - F32(0.5)
    u = min(u, F32(width - 1)) if u > 0 else F32(0)  # 0 also where u is no number
    v = min(v, F32(height - 1)) if v > 0 else F32(0)
    left, top = min(int(u), max(width - 2, 0)), min(int(v), max(height - 2, 0))
    return inside, left, top, u - F32(left), v - F32(top)


@inlined
@no_type_check
def in_cells(positions, at, width, height):
    """Left column, top row and how far beyond their centres, of the point whose (u, v) in cells are number ``at`` of
    ``positions``; the border's outside the map."""
    u, v = positions[2 * at] - F32(0.5), positions[2 * at + 1] - F32(0.5)
    u = min(u, F32(width - 1)) if u > 0 else F32(0)  # 0 also where u is no number
    v = min(v, F32(height - 1)) if v > 0 else F32(0)
    left, top = min(int(u), max(width - 2, 0)), min(int(v), max(height - 2, 0))
    return left, top, u - F32(left), v - F32(top)


@compiled
@no_type_check
def match_kernel(channels: int, groups: int, colours: int, only_similarity: bool):
    """Projection, lookup and matching of points [first, last) of [sample, pixel]; arrays are flat.

    Writes, a point: the cues of ``matching.Matching`` (group similarities mean and best; unless ``only_similarity``,
    also means, and spreads of the groups or of the colours), their agreement, and per view visibility and values.
    """
    values_count = channels + colours
    coloured = colours > 0
    cues_count = 2 * groups + (0 if only_similarity else values_count + (colours if coloured else groups + 2))

    @no_type_check
    def kernel(
        maps, views, height, width, rays, origins, inverse_depths, pixels, per_pixel, photo_width, photo_height,
        map_scale, points, first, last, cues, agreement, seen, values,
    ):  # fmt: skip
        right = values_count if width > 1 else 0
        below = width * values_count if height > 1 else 0
        keep = values.size > 1
        buffer = np.empty(views * values_count, F32)
        sees = np.empty(views, np.bool_)
        for point in range(first, last):
            sample = point // pixels
            pixel = point - sample * pixels
            inverse_depth = inverse_depths[point if per_pixel else sample]
            count = 0
            for view in range(views):
                inside, left, top, fu, fv = in_map(
                    rays, origins, view, pixels, pixel, inverse_depth, photo_width, photo_height, map_scale,
                    width, height,
                )  # fmt: skip
                sees[view] = inside
                seen[view * points + point] = inside
                count += inside
                at = ((view * height + top) * width + left) * values_count
                row = scale(load(maps, at, values_count), (F32(1) - fu) * (F32(1) - fv))
                row = add_scaled(row, load(maps, at + right, values_count), fu * (F32(1) - fv))
                row = add_scaled(row, load(maps, at + below, values_count), (F32(1) - fu) * fv)
                row = add_scaled(row, load(maps, at + right + below, values_count), fu * fv)
                store(buffer, view * values_count, row)
                if keep:
                    store(values, (view * points + point) * values_count, row)
            total = filled(F32(0), groups)
            best = filled(F32(-1e30), groups)
            pairs = 0
            for one in range(views):
                if sees[one]:
                    mine = load(buffer, one * values_count, channels)
                    for other in range(one + 1, views):
                        if sees[other]:
                            pairs += 1
                            theirs = load(buffer, other * values_count, channels)
                            similarity = group_sums(multiply(mine, theirs), groups)
                            total = add(total, similarity)
                            best = larger(similarity, best)
            if pairs:
                total = scale(total, F32(1) / F32(pairs))
            else:
                best = total
            agreement[point] = sum_of(total) / F32(groups)
            out = point * cues_count
            store(cues, out, total)
            store(cues, out + groups, best)
            if not only_similarity:
                out += 2 * groups
                share = F32(1) / F32(count if count else views)
                mean = filled(F32(0), values_count)
                for view in range(views):
                    if sees[view] or count == 0:
                        mean = add_scaled(mean, load(buffer, view * values_count, values_count), share)
                store(cues, out, mean)
                out += values_count
                if coloured:
                    spread = filled(F32(0), colours)
                    for view in range(views):
                        if sees[view] or count == 0:
                            apart = subtract(load(buffer, view * values_count, values_count), mean)
                            apart = lanes(apart, channels, values_count)
                            spread = add_scaled(spread, multiply(apart, apart), share)
                    store(cues, out, scale(spread, F32(4)))
                else:
                    spread = filled(F32(0), groups)
                    for view in range(views):
                        if sees[view] or count == 0:
                            apart = subtract(load(buffer, view * values_count, values_count), mean)
                            spread = add_scaled(spread, group_sums(multiply(apart, apart), groups), share)
                    store(cues, out, spread)
                    cues[out + groups] = F32(count) / F32(views)
                    cues[out + groups + 1] = F32(count >= 2)

    return kernel


@inlined
@no_type_check
def in_volume(cells, positions, point, pixel, planes, height, width):
    """Where a point lies in a volume: left column, top row, nearer plane, and how far beyond their centres."""
    u = min(max(cells[2 * pixel] - F32(0.5), F32(0)), F32(width - 1))
    v = min(max(cells[2 * pixel + 1] - F32(0.5), F32(0)), F32(height - 1))
    w = positions[point] * F32(planes) - F32(0.5)
    w = min(w, F32(planes - 1)) if w > 0 else F32(0)
    left, top, plane = min(int(u), max(width - 2, 0)), min(int(v), max(height - 2, 0)), int(w)
    return left, top, plane, u - F32(left), v - F32(top), w - F32(plane)


@compiled
@no_type_check
def voxel_kernel(channels: int):
    """Trilinear lookup in one volume [plane, height, width, channel] at points [first, last) of [sample, pixel].

    ``cells`` are [pixel, (u, v)] in cells, ``positions`` in [0, 1] over the planes, ``out`` [point, channel].
    """

    @no_type_check
    def kernel(volume, planes, height, width, cells, positions, pixels, first, last, out):
        right = channels if width > 1 else 0
        down = width * channels if height > 1 else 0
        for point in range(first, last):
            left, top, plane, fu, fv, fw = in_volume(cells, positions, point, point % pixels, planes, height, width)
            at = ((plane * height + top) * width + left) * channels
            behind = height * width * channels if plane < planes - 1 else 0
            value = filled(F32(0), channels)
            for step in range(2):
                share = fw if step else F32(1) - fw
                above, under = share * (F32(1) - fv), share * fv
                value = add_scaled(value, load(volume, at, channels), (F32(1) - fu) * above)
                value = add_scaled(value, load(volume, at + right, channels), fu * above)
                value = add_scaled(value, load(volume, at + down, channels), (F32(1) - fu) * under)
                value = add_scaled(value, load(volume, at + right + down, channels), fu * under)
                at += behind
            store(out, point * channels, value)

    return kernel


@compiled
@no_type_check
def ray_kernel(
    width: int, heads: int, head_width: int, hidden: int, samples: int, values_count: int, slope: float, halves: bool
):
    """Attention along the rays [first, last), density, compositing: from tokens to what ``FineOutput`` holds.

    Matrices are [input, output]; ``tokens`` [sample, ray, width] (float32, or bfloat16 as uint16), ``agreement`` and
    ``positions`` [sample, ray], ``values`` [view, sample, ray, value], ``seen`` [view, sample, ray].
    """
    mixed = heads * head_width
    twice, thrice = 2 * mixed, 3 * mixed  # constants, as lengths must be
    scoring = F32(head_width**-0.5)
    slope = F32(slope)
    per_width = F32(1 / width)

    @no_type_check
    def kernel(
        tokens, rays, norm_weight, norm_bias, qkv_weight, qkv_bias, out_weight, out_bias, hidden_weight, hidden_bias,
        density_weight, density_bias, gain, epsilon, agreement, positions, values, seen, views, first, last,
        out_views, out_tokens, out_position, out_spread, out_opacity,
    ):  # fmt: skip
        queries = np.empty(samples * mixed, F32)
        keys = np.empty(mixed * samples, F32)  # [channel, sample]
        contents = np.empty(samples * mixed, F32)
        shares = np.empty(samples, F32)
        attended = np.empty(mixed, F32)
        normed = np.empty(width, F32)
        enriched = np.empty(samples * width, F32)
        weights = np.empty(samples, F32)
        norm_scale, norm_shift = load(norm_weight, 0, width), load(norm_bias, 0, width)
        qkv_start, out_start = load(qkv_bias, 0, thrice), load(out_bias, 0, width)
        hidden_start, to_density = load(hidden_bias, 0, hidden), load(density_weight, 0, hidden)
        for ray in range(first, last):
            for sample in range(samples):
                token = load(tokens, (sample * rays + ray) * width, width)
                apart = subtract(token, filled(sum_of(token) * per_width, width))
                variance = sum_of(multiply(apart, apart)) * per_width
                apart = scale(apart, F32(1) / np.sqrt(variance + epsilon))
                store(normed, 0, add(multiply(apart, norm_scale), norm_shift))
                qkv = qkv_start
                for channel in range(width):
                    qkv = add_scaled(qkv, load(qkv_weight, channel * thrice, thrice), normed[channel])
                store(queries, sample * mixed, lanes(qkv, 0, mixed))
                store(attended, 0, lanes(qkv, mixed, twice))
                for channel in range(mixed):
                    keys[channel * samples + sample] = attended[channel]
                store(contents, sample * mixed, lanes(qkv, twice, thrice))
            for sample in range(samples):
                for head in range(heads):
                    scores = filled(F32(0), samples)
                    for channel in range(head * head_width, (head + 1) * head_width):
                        asked = queries[sample * mixed + channel] * scoring
                        scores = add_scaled(scores, load(keys, channel * samples, samples), asked)
                    scores = exponential(subtract(scores, filled(largest_of(scores), samples)))
                    store(shares, 0, scale(scores, F32(1) / sum_of(scores)))
                    mixture = filled(F32(0), head_width)
                    for answering in range(samples):
                        content = load(contents, answering * mixed + head * head_width, head_width)
                        mixture = add_scaled(mixture, content, shares[answering])
                    store(attended, head * head_width, mixture)
                token = add(load(tokens, (sample * rays + ray) * width, width), out_start)
                for channel in range(mixed):
                    token = add_scaled(token, load(out_weight, channel * width, width), attended[channel])
                store(enriched, sample * width, token)
                inner = hidden_start
                for channel in range(width):
                    number = enriched[sample * width + channel]
                    inner = add_scaled(inner, load(hidden_weight, channel * hidden, hidden), number)
                inner = larger(inner, scale(inner, slope))
                logit = sum_of(multiply(inner, to_density)) + density_bias
                weights[sample] = logit + gain * agreement[sample * rays + ray]
            # alpha = 1 - exp(-softplus(x)) = 1 / (1 + exp(-x))
            ones = filled(F32(1), samples)
            alphas = divide(ones, add(ones, exponential(scale(load(weights, 0, samples), F32(-1)))))
            store(weights, 0, alphas)
            transmittance = F32(1)
            for sample in range(samples):
                alpha = weights[sample]
                weights[sample] = transmittance * alpha if sample < samples - 1 else transmittance
                transmittance *= F32(1) - alpha
            out_opacity[ray] = F32(1) - transmittance
            position = F32(0)
            token = filled(F32(0), width)
            for sample in range(samples):
                position += weights[sample] * positions[sample * rays + ray]
                token = add_scaled(token, load(enriched, sample * width, width), weights[sample])
            store(out_tokens, ray * width, token)
            out_position[ray] = position
            variance = F32(0)
            for sample in range(samples):
                apart_by = positions[sample * rays + ray] - position
                variance += weights[sample] * apart_by * apart_by
            out_spread[ray] = np.sqrt(variance + F32(1e-8))
            for view in range(views):
                shown = filled(F32(0), values_count)
                visibility = F32(0)
                for sample in range(samples):
                    at = (view * samples + sample) * rays + ray
                    shown = add_scaled(shown, load(values, at * values_count, values_count), weights[sample])
                    if seen[at]:
                        visibility += weights[sample]
                out = (view * rays + ray) * (values_count + 1)
                store(out_views, out, shown)
                out_views[out + values_count] = visibility

    return kernel


@compiled
@no_type_check
def pair_kernel(channels: int, groups: int):
    """Lookup of both members of every pair in maps of one scale at points [first, last), and their group-wise cosines.

    ``maps`` are [pair, member, height, width, channel], pairs in the order of ``gmflow.view_pairs``, ``positions``
    [view, point, (u, v)] in cells, ``weights`` [pair, point], ``cues`` (sums over the pairs) [point, group].
    """

    @no_type_check
    def kernel(maps, views, height, width, positions, weights, points, first, last, cues):
        right = channels if width > 1 else 0
        below = width * channels if height > 1 else 0
        map_size = height * width * channels
        corners = np.empty(views, np.int64)
        shares = np.empty(4 * views, F32)
        for point in range(first, last):
            for view in range(views):
                left, top, fu, fv = in_cells(positions, view * points + point, width, height)
                corners[view] = (top * width + left) * channels
                shares[4 * view] = (F32(1) - fu) * (F32(1) - fv)
                shares[4 * view + 1] = fu * (F32(1) - fv)
                shares[4 * view + 2] = (F32(1) - fu) * fv
                shares[4 * view + 3] = fu * fv
            total = filled(F32(0), groups)
            pair = 0
            for one in range(views):
                for other in range(one + 1, views):
                    weight = weights[pair * points + point]
                    if weight != 0:
                        at, share = 2 * pair * map_size + corners[one], 4 * one
                        mine = scale(load(maps, at, channels), shares[share])
                        mine = add_scaled(mine, load(maps, at + right, channels), shares[share + 1])
                        mine = add_scaled(mine, load(maps, at + below, channels), shares[share + 2])
                        mine = add_scaled(mine, load(maps, at + right + below, channels), shares[share + 3])
                        at, share = (2 * pair + 1) * map_size + corners[other], 4 * other
                        theirs = scale(load(maps, at, channels), shares[share])
                        theirs = add_scaled(theirs, load(maps, at + right, channels), shares[share + 1])
                        theirs = add_scaled(theirs, load(maps, at + below, channels), shares[share + 2])
                        theirs = add_scaled(theirs, load(maps, at + right + below, channels), shares[share + 3])
                        squares = group_sums(multiply(mine, mine), groups)
                        squares = multiply(squares, group_sums(multiply(theirs, theirs), groups))
                        lengths = square_root(larger(squares, filled(F32(1e-16), groups)))
                        products = group_sums(multiply(mine, theirs), groups)
                        total = add_scaled(total, divide(products, lengths), weight)
                    pair += 1
            store(cues, point * groups, total)

    return kernel


@compiled
@no_type_check
def ray_density_kernel(width: int, heads: int, samples: int):
    """``RayTransformer`` and the density's layers along the rays [first, last): ``raw`` [ray, sample].

    ``tokens`` are [channel, ray, sample], before their ReLU; matrices [output, input]; ``asking`` and ``answering``
    [ray, sample], or of one entry where all do. Vectors are along the samples.
    """
    head_width = width // heads
    scoring = F32(head_width**-0.5)
    per_width = F32(1 / width)

    @no_type_check
    def kernel(
        tokens, rays, to_query, to_key, to_value, merge, norm_weight, norm_bias, epsilon, to_hidden, hidden_bias,
        to_density, density_bias, asking, answering, first, last, raw,
    ):  # fmt: skip
        rows = np.empty(width * samples, F32)
        queries = np.empty(width * samples, F32)
        keys = np.empty(width * samples, F32)
        values = np.empty(width * samples, F32)
        mixed = np.empty(width * samples, F32)
        silence = np.zeros(samples, F32)
        nothing = filled(F32(0), samples)
        for ray in range(first, last):
            for channel in range(width):
                row = load(tokens, (channel * rays + ray) * samples, samples)
                store(rows, channel * samples, larger(row, nothing))
            for channel in range(width):
                query = key = value = nothing
                for other in range(width):
                    row = load(rows, other * samples, samples)
                    query = add_scaled(query, row, to_query[channel * width + other] * scoring)
                    key = add_scaled(key, row, to_key[channel * width + other])
                    value = add_scaled(value, row, to_value[channel * width + other])
                store(queries, channel * samples, query)
                store(keys, channel * samples, key)
                store(values, channel * samples, value)
            if answering.size > 1:
                any_answers = False
                for sample in range(samples):
                    any_answers |= answering[ray * samples + sample]
                for sample in range(samples):
                    heard = answering[ray * samples + sample] or not any_answers
                    silence[sample] = F32(0) if heard else F32(-1e30)
            for sample in range(samples):
                asks = F32(asking.size == 1 or asking[ray * samples + sample])
                for head in range(heads):
                    scores = load(silence, 0, samples)
                    for channel in range(head * head_width, (head + 1) * head_width):
                        asked = queries[channel * samples + sample] * asks
                        scores = add_scaled(scores, load(keys, channel * samples, samples), asked)
                    scores = exponential(subtract(scores, filled(largest_of(scores), samples)))
                    share = F32(1) / sum_of(scores)
                    for channel in range(head * head_width, (head + 1) * head_width):
                        mixture = sum_of(multiply(scores, load(values, channel * samples, samples)))
                        mixed[channel * samples + sample] = mixture * share
            mean = nothing
            for channel in range(width):
                row = load(rows, channel * samples, samples)
                for other in range(width):
                    row = add_scaled(row, load(mixed, other * samples, samples), merge[channel * width + other])
                store(rows, channel * samples, row)
                mean = add_scaled(mean, row, per_width)
            variance = filled(epsilon, samples)
            for channel in range(width):
                apart = subtract(load(rows, channel * samples, samples), mean)
                store(rows, channel * samples, apart)
                variance = add_scaled(variance, multiply(apart, apart), per_width)
            deviation = square_root(variance)
            for channel in range(width):
                row = scale(divide(load(rows, channel * samples, samples), deviation), norm_weight[channel])
                store(rows, channel * samples, add(row, filled(norm_bias[channel], samples)))
            density = filled(density_bias, samples)
            for channel in range(width):
                row = filled(hidden_bias[channel], samples)
                for other in range(width):
                    row = add_scaled(row, load(rows, other * samples, samples), to_hidden[channel * width + other])
                density = add_scaled(density, larger(row, nothing), to_density[channel])
            store(raw, ray * samples, density)

    return kernel


@compiled
@no_type_check
def lookup_kernel(channels: int):
    """Bilinear lookup in one map [height, width, channel] at points [first, last): ``out`` [point, channel].

    ``positions`` are [point, (u, v)] in cells.
    """

    @no_type_check
    def kernel(table, height, width, positions, first, last, out):
        right = channels if width > 1 else 0
        below = width * channels if height > 1 else 0
        for point in range(first, last):
            left, top, fu, fv = in_cells(positions, point, width, height)
            at = (top * width + left) * channels
            row = scale(load(table, at, channels), (F32(1) - fu) * (F32(1) - fv))
            row = add_scaled(row, load(table, at + right, channels), fu * (F32(1) - fv))
            row = add_scaled(row, load(table, at + below, channels), (F32(1) - fu) * fv)
            row = add_scaled(row, load(table, at + right + below, channels), fu * fv)
            store(out, point * channels, row)

    return kernel


@compiled
@no_type_check
def view_code_kernel(hidden: int, code: int):
    """``view_aggregation.SymmetricViews`` at points [first, last) of [ray, sample]: ``out`` [point, 7 + code].

    ``colours`` [view, point, 3], ``seen`` [view, point], ``places`` [point, 3], ``centers`` [view, 3], ``directions``
    [ray, 3], ``rotation`` world to target [3, 3]; matrices are [input, output].
    """
    width = 7 + code

    @no_type_check
    def kernel(
        colours, seen, places, centers, directions, samples, rotation, hidden_weight, hidden_bias, code_weight,
        code_bias, views, points, first, last, out,
    ):  # fmt: skip
        numbers = np.empty(10, F32)
        inner = np.empty(hidden, F32)
        hidden_start, code_start = load(hidden_bias, 0, hidden), load(code_bias, 0, code)
        for point in range(first, last):
            count = 0
            for view in range(views):
                count += seen[view * points + point]
            share = F32(1) / F32(max(count, 1))
            mean = filled(F32(0), 3)
            for view in range(views):
                if seen[view * points + point]:
                    mean = add_scaled(mean, load(colours, 3 * (view * points + point), 3), share)
            variance = filled(F32(0), 3)
            codes = filled(F32(0), code)
            direction = 3 * (point // samples)
            x, y, z = directions[direction], directions[direction + 1], directions[direction + 2]
            for view in range(views):
                if seen[view * points + point]:
                    colour = load(colours, 3 * (view * points + point), 3)
                    apart = subtract(colour, mean)
                    variance = add_scaled(variance, multiply(apart, apart), share)
                    store(numbers, 0, colour)
                    store(numbers, 3, apart)
                    to_x = places[3 * point] - centers[3 * view]
                    to_y = places[3 * point + 1] - centers[3 * view + 1]
                    to_z = places[3 * point + 2] - centers[3 * view + 2]
                    length = max(np.sqrt(to_x * to_x + to_y * to_y + to_z * to_z), F32(1e-12))
                    to_x, to_y, to_z = to_x / length, to_y / length, to_z / length
                    for axis in range(3):
                        turn = rotation[3 * axis] * (to_x - x)
                        turn += rotation[3 * axis + 1] * (to_y - y)
                        numbers[6 + axis] = turn + rotation[3 * axis + 2] * (to_z - z)
                    numbers[9] = to_x * x + to_y * y + to_z * z
                    row = hidden_start
                    for number in range(10):
                        row = add_scaled(row, load(hidden_weight, number * hidden, hidden), numbers[number])
                    store(inner, 0, larger(row, filled(F32(0), hidden)))
                    encoded = code_start
                    for number in range(hidden):
                        encoded = add_scaled(encoded, load(code_weight, number * code, code), inner[number])
                    codes = add_scaled(codes, larger(encoded, filled(F32(0), code)), share)
            store(out, point * width, mean)
            store(out, point * width + 3, variance)
            out[point * width + 6] = F32(count) / F32(views)
            store(out, point * width + 7, codes)

    return kernel


@compiled
@no_type_check
def token_kernel(width: int, heads: int, head_width: int, symmetric: bool, with_latent: bool):
    """View tokens looked up, attention among them and the latent's, and their summary, at points [first, last).

    What ``paper.Refinement`` computes: points are [ray, sample], ``coarse`` and ``fine`` its token maps [view, height,
    width, token], ``coarse_at`` and ``fine_at`` [view, point, (u, v)] in their cells, ``colours`` [view, point, 3],
    ``seen`` [view, point], ``latent`` [ray, token]; matrices are [input, output]. ``out`` is [point, channel].
    """
    mixed = heads * head_width
    twice, thrice = 2 * mixed, 3 * mixed
    together = 16  # exponentials: a head's few would fill a register to a quarter
    scoring = F32(head_width**-0.5)
    per_width = F32(1 / width)

    @no_type_check
    def kernel(
        coarse, coarse_height, coarse_width, coarse_at, fine, fine_height, fine_width, fine_at, colours, seen, latent,
        samples, colour_weight, colour_bias, qkv_weight, merge_weight, norm_weight, norm_bias, epsilon, views, points,
        first, last, out,
    ):  # fmt: skip
        count = views + with_latent
        out_width = ((2 if symmetric else views) + with_latent) * width
        tokens = np.empty(count * width, F32)
        queries = np.empty(count * mixed, F32)
        keys = np.empty(count * mixed, F32)
        contents = np.empty(count * mixed, F32)
        scores = np.zeros((count * count * heads + together - 1) // together * together, F32)
        attended = np.empty(count * mixed, F32)
        silence = np.empty(count, F32)
        colour_start = load(colour_bias, 0, width)
        of_red, of_green = load(colour_weight, 0, width), load(colour_weight, width, width)
        of_blue, of_seen = load(colour_weight, 2 * width, width), load(colour_weight, 3 * width, width)
        norm_scale, norm_shift = load(norm_weight, 0, width), load(norm_bias, 0, width)
        for point in range(first, last):
            seen_by = 0
            for view in range(views):
                at_point = view * points + point
                row = colour_start
                for level in range(2):
                    table = fine if level else coarse
                    positions = fine_at if level else coarse_at
                    map_height, map_width = (fine_height, fine_width) if level else (coarse_height, coarse_width)
                    right = width if map_width > 1 else 0
                    below = map_width * width if map_height > 1 else 0
                    left, top, fu, fv = in_cells(positions, at_point, map_width, map_height)
                    at = ((view * map_height + top) * map_width + left) * width
                    row = add_scaled(row, load(table, at, width), (F32(1) - fu) * (F32(1) - fv))
                    row = add_scaled(row, load(table, at + right, width), fu * (F32(1) - fv))
                    row = add_scaled(row, load(table, at + below, width), (F32(1) - fu) * fv)
                    row = add_scaled(row, load(table, at + right + below, width), fu * fv)
                row = add_scaled(row, of_red, colours[3 * at_point])
                row = add_scaled(row, of_green, colours[3 * at_point + 1])
                row = add_scaled(row, of_blue, colours[3 * at_point + 2])
                sees = seen[at_point]
                if sees:
                    row = add(row, of_seen)
                store(tokens, view * width, larger(row, filled(F32(0), width)))
                silence[view] = F32(0) if sees else F32(-1e4)
                seen_by += sees
            if with_latent:
                store(tokens, views * width, load(latent, point // samples * width, width))
                silence[views] = F32(0)
            elif seen_by == 0:
                silence[:] = F32(0)
            for token in range(count):
                qkv = filled(F32(0), thrice)
                for channel in range(width):
                    qkv = add_scaled(qkv, load(qkv_weight, channel * thrice, thrice), tokens[token * width + channel])
                store(queries, token * mixed, scale(lanes(qkv, 0, mixed), scoring))
                store(keys, token * mixed, lanes(qkv, mixed, twice))
                store(contents, token * mixed, lanes(qkv, twice, thrice))
            for token in range(count):
                query = load(queries, token * mixed, mixed)
                best = filled(F32(-1e30), heads)
                for answering in range(count):
                    score = group_sums(multiply(query, load(keys, answering * mixed, mixed)), heads)
                    score = add(score, filled(silence[answering], heads))
                    store(scores, (token * count + answering) * heads, score)
                    best = larger(score, best)
                for answering in range(count):
                    at = (token * count + answering) * heads
                    store(scores, at, subtract(load(scores, at, heads), best))
            for at in range(0, scores.size, together):
                store(scores, at, exponential(load(scores, at, together)))
            for token in range(count):
                total = filled(F32(0), heads)
                mixture = filled(F32(0), mixed)
                for answering in range(count):
                    heard = load(scores, (token * count + answering) * heads, heads)
                    total = add(total, heard)
                    content = load(contents, answering * mixed, mixed)
                    mixture = add(mixture, multiply(repeated(heard, head_width), content))
                store(attended, token * mixed, divide(mixture, repeated(total, head_width)))
            for token in range(count):
                row = load(tokens, token * width, width)
                for channel in range(mixed):
                    number = attended[token * mixed + channel]
                    row = add_scaled(row, load(merge_weight, channel * width, width), number)
                apart = subtract(row, filled(sum_of(row) * per_width, width))
                variance = sum_of(multiply(apart, apart)) * per_width
                apart = scale(apart, F32(1) / np.sqrt(variance + epsilon))
                store(tokens, token * width, add(multiply(apart, norm_scale), norm_shift))
            at = point * out_width
            if symmetric:
                share = F32(1) / F32(seen_by if seen_by else views)
                mean = filled(F32(0), width)
                for view in range(views):
                    if seen[view * points + point] or seen_by == 0:
                        mean = add_scaled(mean, load(tokens, view * width, width), share)
                spread = filled(F32(0), width)
                for view in range(views):
                    if seen[view * points + point] or seen_by == 0:
                        apart = subtract(load(tokens, view * width, width), mean)
                        spread = add_scaled(spread, multiply(apart, apart), share)
                store(out, at, mean)
                store(out, at + width, spread)
                at += 2 * width
            else:
                for view in range(views):
                    store(out, at, load(tokens, view * width, width))
                    at += width
            if with_latent:
                store(out, at, load(tokens, views * width, width))

    return kernel


@compiled
@no_type_check
def fourier_kernel(frequencies: int):
    """``radiance_field.fourier_features`` of points [first, last): ``positions`` [point, 3], ``out`` [point, width]."""
    angles_count = 3 * frequencies
    width = 3 + 2 * angles_count
    highest = F32(2.0 ** (frequencies - 1))

    @no_type_check
    def kernel(positions, first, last, out):
        angles = np.empty(angles_count, F32)
        for point in range(first, last):
            small = True
            for axis in range(3):
                number = positions[3 * point + axis]
                out[point * width + axis] = number
                small = small and abs(number) * highest < F32(LARGEST_ANGLE)
                for octave in range(frequencies):
                    angles[3 * octave + axis] = number
                    number *= F32(2)
            at = point * width + 3
            if small:
                store(out, at, sine(load(angles, 0, angles_count), 0))
                store(out, at + angles_count, sine(load(angles, 0, angles_count), 1))
            else:
                for number in range(angles_count):
                    out[at + number] = np.sin(angles[number])
                    out[at + angles_count + number] = np.cos(angles[number])

    return kernel


@inlined
@no_type_check
def in_view(to_view, origin, view, u, v, inverse_depth, photo_width, photo_height):
    """Where the point of a target pixel lies in a view: whether the photo shows it, (u, v) there, and its depth there
    over its depth in the target."""
    at = 9 * view
    x = to_view[at] * u + to_view[at + 1] * v + to_view[at + 2] + origin[3 * view] * inverse_depth
    y = to_view[at + 3] * u + to_view[at + 4] * v + to_view[at + 5] + origin[3 * view + 1] * inverse_depth
    ratio = to_view[at + 6] * u + to_view[at + 7] * v + to_view[at + 8] + origin[3 * view + 2] * inverse_depth
    return on_photo(x, y, ratio, photo_width, photo_height)


@compiled
@no_type_check
def occlusion_kernel(least_radius: float, most_radius: float):
    """Shares to which pixels are occluded in views [first, last): ``out`` [view, pixel].

    ``to_view`` [view, 3, 3] and ``origin`` [view, 3] are ``projection.frustum_homography``'s, ``zoom`` [view, 2] is the
    target's focal length over the view's; ``buffer`` [view, side + 2, side + 2] comes filled with zeros.
    """

    @no_type_check
    def kernel(inverse_depths, width, height, to_view, origin, zoom, photo_width, photo_height, slack, side, first,
               last, buffer, out):  # fmt: skip
        pixels, row_length = width * height, side + 2
        for view in range(first, last):
            total, count, left, top = 0.0, 0, F32(np.inf), F32(np.inf)
            for row in range(height):
                for column in range(width):
                    inside, u, v, ratio = in_view(
                        to_view, origin, view, F32(column + 0.5), F32(row + 0.5), inverse_depths[row * width + column],
                        photo_width, photo_height,
                    )  # fmt: skip
                    if inside:
                        total += ratio
                        count += 1
                        left, top = min(left, u), min(top, v)
            mean = F32(total / max(count, 1))
            across, down = zoom[2 * view] * mean, zoom[2 * view + 1] * mean
            corner_u, corner_v = F32(math.floor(left * across)), F32(math.floor(top * down))
            start = view * row_length * row_length
            for draw in (True, False):
                for row in range(height):
                    for column in range(width):
                        pixel = row * width + column
                        inside, u, v, ratio = in_view(
                            to_view, origin, view, F32(column + 0.5), F32(row + 0.5), inverse_depths[pixel],
                            photo_width, photo_height,
                        )  # fmt: skip
                        u, v = u * across - corner_u, v * down - corner_v
                        inside = inside and u >= 0 and u < side and v >= 0 and v < side
                        if not inside:
                            if not draw:
                                out[view * pixels + pixel] = F32(0)
                            continue
                        found = inverse_depths[pixel] / ratio
                        if draw:
                            radius = F32(0.5) * (mean / ratio) - F32(0.5) + F32(least_radius)
                            radius = min(max(radius, F32(least_radius)), F32(most_radius))
                            bottom, right = int(v + F32(1) + radius), int(u + F32(1) + radius)
                            for y in range(int(v + F32(1) - radius), min(bottom, side + 1) + 1):
                                for x in range(int(u + F32(1) - radius), min(right, side + 1) + 1):
                                    cell = start + y * row_length + x
                                    buffer[cell] = max(buffer[cell], found)
                        else:
                            nearest = buffer[start + int(v + F32(1)) * row_length + int(u + F32(1))]
                            allowed = slack * max(F32(1) / (ratio * ratio), F32(1))
                            share = (nearest - found) / allowed - F32(1)
                            out[view * pixels + pixel] = min(max(share, F32(0)), F32(1))

    return kernel
