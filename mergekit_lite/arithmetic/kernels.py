"""The inner loops of merging, compiled by numba.

Each walks its tensors once, in blocks that fit the innermost cache, without the interpreter's lock: a merge waits for
memory and not for its other threads. Arrays have one axis. Inputs and outputs are float32 or float64, or uint16, which
are the bits of bfloat16 (`chunks` makes them of tensors). `work` is room for a few blocks, [rows, BLOCK], and its type
is that of the arithmetic. What tells a model's share in it is an array with an entry a model, of the same type.

All loops are in this file, as numba looks at a function's own file to tell whether what it compiled before still holds.
NaN in an input is NaN in the result, so that it is found: a comparison with it is false, and must then not drop it.
"""

import math

import numpy as np
from numba import types
from numba.extending import overload

from wtool.compiled import bits as _bits
from wtool.compiled import compiled, fma

BLOCK = 1024  # elements
SEGMENT = 1 << 16  # elements, after which a scan tells where it is
LANES = 256  # sums that are added to in turn, so that vectors do it and errors stay small


def _copy(part, out):
    for i in range(out.size):
        out[i] = part[i]


def _from_bfloat16(part, out):
    for i in range(out.size):
        out[i] = _bits(np.uint32(part[i]) << np.uint32(16))


def _to_bfloat16(part, out):
    for i in range(out.size):
        value = np.float32(part[i])
        bits = _bits(value)
        half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        out[i] = np.uint16((bits + half) >> np.uint32(16)) if value == value else np.uint16(0x7FC0)


def _load(part, out):
    """Read numbers."""


@overload(_load)
def _compile_load(part, out):
    return _from_bfloat16 if part.dtype == types.uint16 else _copy


def _plain_away(part, origin, out):
    for i in range(out.size):
        out[i] = part[i] - origin[i]


def _bfloat16_away(part, origin, out):
    for i in range(out.size):
        out[i] = _bits(np.uint32(part[i]) << np.uint32(16)) - origin[i]


def _load_away(part, origin, out):
    """Read numbers, less those of the base, which were read before."""


@overload(_load_away)
def _compile_load_away(part, origin, out):
    return _bfloat16_away if part.dtype == types.uint16 else _plain_away


def _store(part, out):
    """Write numbers, to bfloat16 rounded to the nearest, and of two the even one."""


@overload(_store)
def _compile_store(part, out):
    return _to_bfloat16 if out.dtype == types.uint16 else _copy


@compiled
def _total(numbers):
    """The sum, by halves: of small error, and in the same order on every machine. Overwrites the numbers."""
    size = numbers.size
    while size > 16:
        half = (size + 1) // 2
        first, second = numbers[: size - half], numbers[half:size]
        for i in range(second.size):
            first[i] += second[i]
        size = half
    total = numbers.dtype.type(0)
    for i in range(size):
        total += numbers[i]
    return total


# Selection


def _plain_distance(one, other, out):
    for i in range(out.size):
        out[i] = abs(other[i] - one[i])


def _bfloat16_distance(one, other, out):
    for i in range(out.size):
        first, second = _bits(np.uint32(one[i]) << np.uint32(16)), _bits(np.uint32(other[i]) << np.uint32(16))
        out[i] = abs(second - first)


def _distance(one, other, out):
    """|other - one|, read and computed at once."""


@overload(_distance)
def _compile_distance(one, other, out):
    return _bfloat16_distance if one.dtype == types.uint16 else _plain_distance


@compiled
def spread(tensors, out, work):
    """How far tensors lie apart: of two the distance, of more the squares of their deviations from the mean, summed."""
    for start in range(0, out.size, BLOCK):
        stop = min(start + BLOCK, out.size)
        _spread_block(tensors, start, stop, out[start:stop], work)


@compiled
def _spread_block(tensors, start, stop, out, work):
    """Of some elements."""
    if len(tensors) == 2:
        _distance(tensors[0][start:stop], tensors[1][start:stop], out)
        return
    for m in range(len(tensors)):
        _load(tensors[m][start:stop], work[2 + m, : stop - start])
    _spread(work[2 : 2 + len(tensors)], out, work[1])


@compiled
def _spread(parts, out, mean):
    first = parts[0]
    if len(parts) == 2:
        second = parts[1]
        for i in range(out.size):
            out[i] = abs(second[i] - first[i])
        return
    # of differences to the first: where all are equal, nothing is left
    share = out.dtype.type(1.0 / len(parts))
    mean[:] = out.dtype.type(0)
    for m in range(1, len(parts)):
        part = parts[m]
        for i in range(out.size):
            mean[i] += share * (part[i] - first[i])
    for i in range(out.size):
        out[i] = mean[i] * mean[i]
    for m in range(1, len(parts)):
        part = parts[m]
        for i in range(out.size):
            away = part[i] - first[i] - mean[i]
            out[i] += away * away


@compiled
def scale_rows(numbers, begin, columns, factors):
    """Multiply the piece that begins with an element by its rows' factors."""
    end = begin + numbers.size
    for row in range(begin // columns, (end + columns - 1) // columns):
        part = numbers[max(row * columns - begin, 0) : min((row + 1) * columns, end) - begin]
        factor = factors[row]
        for i in range(part.size):
            part[i] *= factor


@compiled
def scan(tensors, begin, columns, factors, low, high, most, above, inside, pools, ends, work, flags):
    """Count, for each of some brackets, the spreads above it, and gather those inside it in its pool. Of a bracket of
    one number those equal to it are counted and not gathered. NaN is above.

    begin, columns, factors: as of `scale_rows`; of no factors, spreads are taken as they are
    low, high:               the brackets [brackets]
    most:                    a bracket that has so many above it, or fills its pool, is given up: its `above` is that
    above, inside:           go on from what they are [brackets]
    pools:                   [brackets, elements]
    ends:                    is set to `inside` after each SEGMENT elements of the tensors [brackets, segments]
    work, flags:             room; flags are [BLOCK] bytes
    """
    for start in range(0, tensors[0].size, BLOCK):
        stop = min(start + BLOCK, tensors[0].size)
        far = work[0, : stop - start]
        _spread_block(tensors, start, stop, far, work)
        if factors.size:
            scale_rows(far, begin + start, columns, factors)
        for bracket in range(low.size):
            if above[bracket] >= most[bracket]:
                continue
            pool, place = pools[bracket], inside[bracket]
            if low[bracket] == high[bracket]:
                over, place = _compare(far, low[bracket], place)
            elif place + far.size < pool.size:
                over, place = _gather(far, low[bracket], high[bracket], pool, place, flags)
            else:
                over = most[bracket]
            above[bracket] = min(above[bracket] + over, most[bracket])
            inside[bracket] = place
            ends[bracket, (begin + start) // SEGMENT] = place


@compiled
def _compare(part, number, equal):
    """How many are above a number; so many equal, and those that are."""
    not_above, same = np.int32(0), np.int32(0)
    for i in range(part.size):
        not_above += np.int32(part[i] <= number)
        same += np.int32(part[i] == number)
    return np.int64(part.size - not_above), equal + same


@compiled
def _gather(part, low, high, pool, place, flags):
    """How many are above a bracket; what is inside is put into the pool from a place on: the place after it."""
    not_above = np.int32(0)
    for i in range(part.size):
        is_not_above = part[i] <= high
        flags[i] = np.uint8(part[i] >= low) & np.uint8(is_not_above)
        not_above += np.int32(is_not_above)
    words, full = flags.view(np.uint64), part.size // 8
    for word in range(full):
        if words[word]:
            for i in range(8):
                pool[place] = part[8 * word + i]
                place += flags[8 * word + i]
    for i in range(8 * full, part.size):
        pool[place] = part[i]
        place += flags[i]
    return np.int64(part.size - not_above), place


# Task vectors


@compiled
def _keep(part, low, end):
    """Set to 0 what is less than `low`, and from element `end` on what is equal to it."""
    zero, end = part.dtype.type(0), min(max(end, 0), part.size)
    first, rest = part[:end], part[end:]
    for i in range(first.size):
        first[i] = zero if abs(first[i]) < low else first[i]
    for i in range(rest.size):
        rest[i] = zero if abs(rest[i]) <= low else rest[i]


@compiled
def _drop(part, high, end):
    """Set to 0 what is more than `high`, and before element `end` what is equal to it."""
    zero, end = part.dtype.type(0), min(max(end, 0), part.size)
    first, rest = part[:end], part[end:]
    for i in range(first.size):
        first[i] = zero if abs(first[i]) >= high else first[i]
    for i in range(rest.size):
        rest[i] = zero if abs(rest[i]) > high else rest[i]


@compiled
def _subtract(part, other):
    for i in range(part.size):
        part[i] -= other[i]


@compiled
def _add(part, other, share):
    for i in range(part.size):
        part[i] += share * other[i]


@compiled
def _multiply(part, other):
    for i in range(part.size):
        part[i] *= other[i]


def _scale(part, factors, level):
    for i in range(part.size):
        part[i] *= factors[i]


def _drop_at_random(part, factors, level):
    zero, one = part.dtype.type(0), part.dtype.type(1)
    for i in range(part.size):
        part[i] *= one if factors[i] < level else zero


def _multiply_or_drop(part, factors, level):
    """Multiply by factors, or by 0 where random bits are not below a level."""


@overload(_multiply_or_drop)
def _compile_multiply_or_drop(part, factors, level):
    return _drop_at_random if factors.dtype == types.uint16 else _scale


@compiled
def _thin(part, start, cuts, ends, factors, level):
    """Thin the piece of a task vector that begins with an element; parameters as of `merge`, of this model."""
    if cuts[1] < np.inf:
        _drop(part, cuts[1], ends[1] - start)
    if cuts[0] >= 0:
        _keep(part, cuts[0], ends[0] - start)
    if factors.size:
        _multiply_or_drop(part, factors, level)


@compiled
def merge(base, models, out, work, cuts, ends, factors, levels, times, weight, elect, normalize, scale):
    """Add thinned task vectors to the base, after an election of signs or without.

    cuts:    [models, 2]: elements of less magnitude than the first are dropped, and of more than the second
    ends:    [models, 2], int64: before which element those equal to the first are kept, and to the second dropped
    factors: of each model what its task vector is multiplied by [elements], or random bits, uint16; or [0]
    levels:  [models], int32: elements are kept where random bits are less
    times:   [models], and this
    weight:  [models], what each counts in the mean of those with the elected sign
    normalize, scale: of the elected's sum, and of what is added
    """
    zero, one = work.dtype.type(0), work.dtype.type(1)
    for start in range(0, base.size, BLOCK):
        stop = min(start + BLOCK, base.size)
        size = stop - start
        origin, total, count, agreed = work[0, :size], work[1, :size], work[2, :size], work[3, :size]
        _load(base[start:stop], origin)
        total[:] = zero
        for m in range(len(models)):
            part = work[4 + m, :size]
            _load_away(models[m][start:stop], origin, part)
            _thin(part, start, cuts[m], ends[m], factors[m][start:stop], levels[m])
            if elect and times[m] != one:
                for i in range(size):
                    part[i] *= times[m]
            _add(total, part, one if elect else times[m])
        if elect:
            agreed[:] = zero
            count[:] = zero
            for m in range(len(models)):
                _agree(work[4 + m, :size], total, agreed, count, one, weight[m])
            _turn_back(agreed, count, total, normalize)
        _add(origin, total, scale)
        _store(origin, out[start:stop])


@compiled
def _agree(part, total, agreed, count, share, weight):
    """Add up a share of what has the sign of the total, turned to be positive, and count its weight."""
    zero = part.dtype.type(0)
    for i in range(part.size):
        turned = part[i] if total[i] >= zero else -part[i]
        turned = zero if turned < zero else turned
        agreed[i] += share * turned
        count[i] += weight if turned > zero else zero


@compiled
def _turn_back(agreed, count, total, normalize):
    """Give what was added up the sign of the total, and put it in its place; its mean if asked."""
    zero, one = total.dtype.type(0), total.dtype.type(1)
    if normalize:
        for i in range(total.size):
            agreed[i] /= count[i] if count[i] != zero else one
    for i in range(total.size):
        total[i] = agreed[i] if total[i] >= zero else -agreed[i]


@compiled
def lengths(base, model, work, cuts, ends, factors, level):
    """The l1 norm of a task vector before and after it is thinned; parameters as of `merge`, of this model."""
    before = after = 0.0
    for start in range(0, base.size, BLOCK):
        stop = min(start + BLOCK, base.size)
        origin, part = work[0, : stop - start], work[1, : stop - start]
        _load(base[start:stop], origin)
        _load_away(model[start:stop], origin, part)
        before += _length(part, origin)
        _thin(part, start, cuts, ends, factors[start:stop], level)
        after += _length(part, origin)
    return before, after


@compiled
def _length(part, room):
    for i in range(part.size):
        room[i] = abs(part[i])
    return _total(room)


# Sums and products


@compiled
def weighted_sum(models, out, work, shares):
    """sum_i s_i theta_i."""
    for start in range(0, out.size, BLOCK):
        stop = min(start + BLOCK, out.size)
        total, part = work[0, : stop - start], work[1, : stop - start]
        _load(models[0][start:stop], total)
        for i in range(total.size):
            total[i] *= shares[0]
        for m in range(1, len(models)):
            _load(models[m][start:stop], part)
            _add(total, part, shares[m])
        _store(total, out[start:stop])


@compiled
def between(first, second, out, work, share):
    """first + share (second - first), from the nearer end, so that both ends are exact."""
    half, one = work.dtype.type(0.5), work.dtype.type(1)
    for start in range(0, out.size, BLOCK):
        stop = min(start + BLOCK, out.size)
        part, other = work[0, : stop - start], work[1, : stop - start]
        _load(first[start:stop], part)
        _load(second[start:stop], other)
        if share < half:
            for i in range(part.size):
                part[i] += share * (other[i] - part[i])
        else:
            for i in range(part.size):
                part[i] = other[i] - (other[i] - part[i]) * (one - share)
        _store(part, out[start:stop])


@compiled
def products(models, sums, work, has_base):
    """Add the products of each two models to [N, N, LANES], on the diagonal and above, each element's to one lane.

    work:     [N, BLOCK], with a base [N + 1, BLOCK], in float64 as are the sums
    has_base: the last of the models is one, and all are taken less it
    """
    count = len(models) - 1 if has_base else len(models)
    for start in range(0, models[0].size, BLOCK):
        size = min(start + BLOCK, models[0].size) - start
        for m in range(len(models)):
            _load(models[m][start : start + size], work[m, :size])
        for m in range(count):
            if has_base:
                _subtract(work[m, :size], work[count, :size])
            for other in range(m + 1):
                for first in range(0, size, LANES):
                    last = min(first + LANES, size)
                    _add_products(sums[other, m], work[other, first:last], work[m, first:last])


@compiled
def _add_products(sums, part, other):
    for i in range(part.size):
        sums[i] = fma(part[i], other[i], sums[i])


@compiled
def gram(sums, total):
    """Sum the lanes of `products` to dot products [N, N]; overwrites them."""
    for m in range(len(total)):
        for other in range(m + 1):
            total[other, m] = total[m, other] = _total(sums[other, m])


# SCE


@compiled
def _select(base, models, start, stop, cut, end, work):
    """Task vectors in work[4:], without what is not selected where the cut is not below 0, and the base in work[0]."""
    size = stop - start
    origin, mask = work[0, :size], work[1, :size]
    zero, one = work.dtype.type(0), work.dtype.type(1)
    _load(base[start:stop], origin)
    for m in range(len(models)):
        _load(models[m][start:stop], work[4 + m, :size])
    if cut >= 0:
        _spread(work[4 : 4 + len(models)], mask, work[2, :size])
        _keep(mask, cut, end - start)
        for i in range(size):
            mask[i] = one if mask[i] != zero else zero
    for m in range(len(models)):
        _subtract(work[4 + m, :size], origin)
        if cut >= 0:
            _multiply(work[4 + m, :size], mask)


@compiled
def selected_squares(base, models, total, work, room, cut, end):
    """Add up the squares of what is selected of each model's task vector; parameters as of `merge_selected`.

    room: [BLOCK] in float64, as squares of small numbers are 0 in float32
    """
    for start in range(0, base.size, BLOCK):
        stop = min(start + BLOCK, base.size)
        _select(base, models, start, stop, cut, end, work)
        for m in range(len(models)):
            part, squares = work[4 + m, : stop - start], room[: stop - start]
            for i in range(part.size):
                squares[i] = np.float64(part[i]) * np.float64(part[i])
            total[m] += _total(squares)


@compiled
def merge_selected(base, models, out, work, cut, end, shares):
    """Add to the base the mean of what has the sign of the models' sum, where they lie apart.

    cut, end: the elements of less spread are left as they are, and those equal to it from `end` on; cut < 0: none
    """
    zero, one = work.dtype.type(0), work.dtype.type(1)
    for start in range(0, base.size, BLOCK):
        stop = min(start + BLOCK, base.size)
        size = stop - start
        _select(base, models, start, stop, cut, end, work)
        origin, total, count, agreed = work[0, :size], work[1, :size], work[2, :size], work[3, :size]
        total[:] = zero
        agreed[:] = zero
        count[:] = zero
        for m in range(len(models)):
            _add(total, work[4 + m, :size], one)
        for m in range(len(models)):
            _agree(work[4 + m, :size], total, agreed, count, shares[m], shares[m])
        _turn_back(agreed, count, total, True)
        _add(origin, total, one)
        _store(origin, out[start:stop])


# DELLA


@compiled
def rank_keys(tensors, columns, first, keys, work):
    """Numbers that sort as the distances of two tensors in a row do, and of equal ones as their places, which are their
    low halves.

    first: the place of the first element in its row
    """
    place = first
    for start in range(0, keys.size, BLOCK):
        stop = min(start + BLOCK, keys.size)
        _spread_block(tensors, start, stop, work[0, : stop - start], work)
        begin = start
        while begin < stop:
            end = min(begin + columns - place, stop)
            part, out = work[0, begin - start : end - start], keys[begin:end]
            for i in range(part.size):
                out[i] = np.uint64(_bits(part[i])) << np.uint64(32) | np.uint64(place + i)
            place = (place + end - begin) % columns
            begin = end


@compiled
def factors_of_ranks(keys, numbers, last, factors, out):
    """Put each rank's factor where its element is, or 0 where its random number is more than the last that keeps it.

    keys:          in each row in ascending order
    last, factors: [columns]
    """
    columns, zero = last.size, out.dtype.type(0)
    chosen = np.empty(columns, dtype=out.dtype)
    for row in range(0, keys.size, columns):
        order, drawn, places = keys[row : row + columns], numbers[row : row + columns], out[row : row + columns]
        for rank in range(columns):
            chosen[rank] = factors[rank] if drawn[rank] <= last[rank] else zero
        for rank in range(columns):
            places[np.uint32(order[rank] & np.uint64(0xFFFFFFFF))] = chosen[rank]


# RAM


@compiled
def _count_changes(base, models, start, stop, epsilon, work):
    """Task vectors without their smallest elements in work[3:], how many have one in work[1], the base in work[0]."""
    size = stop - start
    origin, count, zero, one = work[0, :size], work[1, :size], work.dtype.type(0), work.dtype.type(1)
    _load(base[start:stop], origin)
    count[:] = zero
    for m in range(len(models)):
        part = work[3 + m, :size]
        _load_away(models[m][start:stop], origin, part)
        _keep(part, epsilon, 0)
        for i in range(size):
            count[i] += one if part[i] != zero else zero


@compiled
def count_unique(base, models, work, epsilon, changed, unique):
    """Add up how many elements each model changed, and changed alone."""
    zero, one = work.dtype.type(0), work.dtype.type(1)
    for start in range(0, base.size, BLOCK):
        stop = min(start + BLOCK, base.size)
        _count_changes(base, models, start, stop, epsilon, work)
        count = work[1, : stop - start]
        for m in range(len(models)):
            part = work[3 + m, : stop - start]
            all_, alone = np.int32(0), np.int32(0)
            for i in range(part.size):
                all_ += np.int32(part[i] != zero)
                alone += np.int32(part[i] != zero) & np.int32(count[i] == one)
            changed[m] += all_
            unique[m] += alone


@compiled
def merge_unique(base, models, out, work, epsilon, times):
    """Add to the base what one model changed, times that model's factor, and the mean of what several did."""
    zero, one = work.dtype.type(0), work.dtype.type(1)
    for start in range(0, base.size, BLOCK):
        stop = min(start + BLOCK, base.size)
        size = stop - start
        _count_changes(base, models, start, stop, epsilon, work)
        origin, count, total = work[0, :size], work[1, :size], work[2, :size]
        total[:] = zero
        for m in range(len(models)):
            part = work[3 + m, :size]
            for i in range(size):
                total[i] += part[i] * times[m] if count[i] == one else part[i]
        for i in range(size):
            origin[i] += total[i] / (count[i] if count[i] > one else one)
        _store(origin, out[start:stop])


# Arcee Fusion

FLOOR = 1e-8  # added to each probability
_LEAST = 1e-5  # a probability from which on the floor is so little that five terms tell its logarithm
_LOG2_E, _LN_2, _LN_2_REST = 1.4426950408889634, 0.6931471805599453, 2.3190468138462996e-17
_ROUND = 1.5 * 2.0**52  # added, a number's last bit is worth 1
_OF = tuple(1.0 / math.factorial(k) for k in range(14))  # the series of e ** x


@compiled
def divergences(base, model, columns, found, room):
    """The Kullback-Leibler divergence of the softmax of each row, that of the model from that of the base.

    base, model: rows one after the other
    found:       is filled [rows]
    room:        [4, columns], and all in float64
    """
    new, old, away, terms = room[0], room[1], room[2], room[3]  # to unpack it would tell nothing of their strides
    for row in range(found.size):
        _load(model[row * columns : (row + 1) * columns], new)
        _load(base[row * columns : (row + 1) * columns], old)
        for i in range(columns):
            away[i] = new[i] - old[i]
        top, old_top = _extreme(new, terms, 1.0), _extreme(old, terms, 1.0)
        low, old_low = _extreme(new, terms, -1.0), _extreme(old, terms, -1.0)
        total, old_total = _powers(new, top, terms), _powers(old, old_top, terms)
        if math.exp(low - top) > _LEAST * total and math.exp(old_low - old_top) > _LEAST * old_total:
            shift = math.log(total / old_total) + (top - old_top)
            _terms_near(new, old, away, 1.0 / total, 1.0 / old_total, shift, terms)
        else:
            for i in range(columns):
                p, q = new[i] / total + FLOOR, old[i] / old_total + FLOOR
                terms[i] = p * math.log(p / q)
        found[row] = max(_total(terms), 0.0)


@compiled
def _extreme(numbers, room, sign):
    """The largest, or with a sign of -1 the least: of each lane, and of those by halves, as vectors can."""
    size = min(numbers.size, 256)
    room[:size] = numbers[:size]
    for start in range(size, numbers.size, size):
        begin = min(start, numbers.size - size)
        _keep_larger(room[:size], numbers[begin : begin + size], sign)
    while size > 1:
        half = (size + 1) // 2
        _keep_larger(room[: size - half], room[half:size], sign)
        size = half
    return room[0]


@compiled
def _keep_larger(part, other, sign):
    for i in range(part.size):
        part[i] = other[i] if sign * other[i] > sign * part[i] else part[i]


@compiled
def _powers(numbers, largest, room):
    """Put e to the power of each less the largest in its place, as 2 ** n times a series; their sum."""
    for i in range(numbers.size):
        power = numbers[i] - largest
        power = power if power > -700.0 else -700.0
        moved = fma(power, _LOG2_E, _ROUND)
        n = moved - _ROUND
        rest = fma(n, -_LN_2_REST, fma(n, -_LN_2, power))
        value = fma(fma(_OF[13], rest, _OF[12]), rest, _OF[11])
        value = fma(fma(fma(value, rest, _OF[10]), rest, _OF[9]), rest, _OF[8])
        value = fma(fma(fma(value, rest, _OF[7]), rest, _OF[6]), rest, _OF[5])
        value = fma(fma(fma(value, rest, _OF[4]), rest, _OF[3]), rest, _OF[2])
        value = fma(fma(value, rest, 1.0), rest, 1.0)
        value *= _bits((_bits(moved) + np.int64(1023)) << np.int64(52))
        numbers[i] = value
        room[i] = value
    return _total(room)


@compiled
def _terms_near(new, old, away, share, old_share, shift, out):
    """p log(p / q) of two probabilities with their floors: log(p / q) is what the numbers are apart less the shift, and
    what the floors add to it, log(1 + w)."""
    for i in range(out.size):
        p, q = share * new[i], old_share * old[i]
        w = FLOOR * (q - p) / (p * (q + FLOOR))
        value = fma(fma(fma(fma(0.2, w, -0.25), w, 1.0 / 3.0), w, -0.5), w, 1.0)
        out[i] = (p + FLOOR) * fma(value, w, away[i] - shift)


@compiled
def merge_important(base, model, out, work, begin, columns, factors, least):
    """Take the model's elements where |model - base| times the row's factor is not less than a number, else the base's.

    begin: the element that the piece begins with; factors: of all rows
    """
    end = begin + out.size
    for row in range(begin // columns, (end + columns - 1) // columns):
        first, last = max(row * columns, begin), min((row + 1) * columns, end)
        factor = factors[row]
        for start in range(first, last, BLOCK):
            place, stop = start - begin, min(start + BLOCK, last) - begin
            origin, other = work[0, : stop - place], work[1, : stop - place]
            _load(base[place:stop], origin)
            _load(model[place:stop], other)
            for i in range(origin.size):
                taken = abs(other[i] - origin[i]) * factor >= least or other[i] != other[i]  # NaN is not lost
                origin[i] = other[i] if taken else origin[i]
            _store(origin, out[place:stop])


# NearSwap


@compiled
def merge_near(base, model, out, work, most):
    """The model, at most so far away from the base."""
    for start in range(0, base.size, BLOCK):
        stop = min(start + BLOCK, base.size)
        origin, other = work[0, : stop - start], work[1, : stop - start]
        _load(base[start:stop], origin)
        _load(model[start:stop], other)
        for i in range(origin.size):
            low, high = origin[i] - most, origin[i] + most
            held = low if other[i] < low else other[i]
            held = high if held > high else held
            other[i] = held if origin[i] == origin[i] else origin[i]  # NaN is not lost
        _store(other, out[start:stop])
