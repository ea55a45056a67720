"""The merge methods on angles and lengths, written as plainly as they are defined: loops over lists, in float64.

Vectors are kept whole here, where the methods know only their dot products.
"""

import math


def dot(a, b):
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def norm(a):
    return math.sqrt(dot(a, a))


def times(factor, a):
    return [factor * x for x in a]


def plus(*vectors):
    return [math.fsum(parts) for parts in zip(*vectors, strict=True)]


def minus(a, b):
    return [x - y for x, y in zip(a, b, strict=True)]


def unit(a):
    return times(1 / norm(a), a) if norm(a) else a


def on_differences(merge, base, models, **options):
    """A method on task vectors, or on the weights themselves where there is no base."""
    if base is None:
        return merge(models, **options)
    return plus(base, merge([minus(model, base) for model in models], **options))


def on_each(merge, base, models, size, vectors, columns):
    """A method on each row, column, or the whole of matrices given as flat lists."""
    groups = [range(size)]
    if vectors == "rows":
        groups = [range(start, start + columns) for start in range(0, size, columns)]
    if vectors == "columns":
        groups = [range(start, size, columns) for start in range(columns)]
    out = [0.0] * size
    for group in groups:
        start = None if base is None else [base[i] for i in group]
        for i, x in zip(group, merge(start, [[model[i] for i in group] for model in models]), strict=True):
            out[i] = x
    return out


def arc(models, *, t):
    a, b = models
    line = plus(times(1 - t, a), times(t, b))
    if not norm(a) or not norm(b):
        return line
    angle = math.acos(max(-1.0, min(1.0, dot(unit(a), unit(b)))))
    if math.sin(angle) < 1e-6:
        return line
    return plus(times(math.sin((1 - t) * angle) / math.sin(angle), a), times(math.sin(t * angle) / math.sin(angle), b))


def nuslerp(base, models, *, weight, vectors="tensor", columns=1):
    t = weight[1] / sum(weight) if abs(sum(weight)) > 1e-6 else 0.5
    return on_each(lambda b, m: on_differences(arc, b, m, t=t), base, models, len(models[0]), vectors, columns)


def to_tangent(point, direction):
    return minus(direction, times(dot(direction, point), point))


def turned(point, tangent):
    """The end of the arc that leaves a point along a tangent, as long as the tangent."""
    length = norm(tangent)
    return plus(times(math.cos(length), point), times(math.sin(length) / length if length else 1.0, tangent))


def spherical_step(models, *, weight):
    mean = plus(*[times(w, unit(x)) for w, x in zip(weight, models, strict=True)])
    if norm(mean) < 1e-7:
        return plus(*[times(w, x) for w, x in zip(weight, models, strict=True)])
    point = unit(mean)
    tangent = plus(*[times(w, to_tangent(point, unit(x))) for w, x in zip(weight, models, strict=True)])
    return times(sum(w * norm(x) for w, x in zip(weight, models, strict=True)), turned(point, tangent))


def multislerp(base, models, *, weight, normalize_weights=True):
    if normalize_weights and abs(sum(weight)) > 1e-8:
        weight = [w / sum(weight) for w in weight]
    return on_differences(spherical_step, base, models, weight=weight)


def karcher(models, *, weight=None, max_iter=10, tol=1e-5):
    weight = weight or [1.0] * len(models)
    length = sum(w * norm(x) for w, x in zip(weight, models, strict=True)) / sum(weight)
    directions = [(w, unit(x)) for w, x in zip(weight, models, strict=True) if norm(x) and w]
    if not directions:
        return [0.0] * len(models[0])
    total = sum(w for w, _ in directions)
    mean = plus(*[times(w / total, u) for w, u in directions])
    point = directions[0][1] if norm(mean) < tol else unit(mean)
    for _ in range(max_iter):
        arcs = []
        for w, u in directions:
            angle = math.acos(max(-1.0, min(1.0, dot(u, point))))
            stretch = angle / math.sin(angle) if math.sin(angle) > 1e-7 else 1.0
            arcs.append(times(w / total * stretch, to_tangent(point, u)))
        step = plus(*arcs)
        if norm(step) < tol:
            break
        point = unit(turned(point, step))
    return times(length, point)


def stock(base, models, *, clamp):
    n = len(models)
    deltas = [minus(model, base) for model in models]
    pairs = [dot(unit(deltas[i]), unit(deltas[j])) for i in range(n) for j in range(i)]
    cosine = sum(pairs) / len(pairs)
    divisor = 1 + (n - 1) * cosine
    t = n * cosine / divisor if abs(divisor) >= 1e-6 else 0.0
    if clamp:
        t = max(0.0, min(1.0, t))
    return plus(base, times(t / n, plus(*deltas)))


def model_stock(base, models, *, filter_wise=False, clamp=True, columns=1):
    vectors = "rows" if filter_wise else "tensor"
    return on_each(lambda b, m: stock(b, m, clamp=clamp), base, models, len(base), vectors, columns)


def nearswap(base, models, *, t):
    (other,) = models
    out = []
    for b, x in zip(base, other, strict=True):
        share = 1.0 if x == b else min(1.0, t / abs(x - b))
        out.append(share * x + (1 - share) * b)
    return out


def softmax(row):
    powers = [math.exp(x - max(row)) for x in row]
    return [power / math.fsum(powers) for power in powers]


def arcee_fusion(base, models, *, columns, iqr_factor=1.5):
    (model,) = models
    importance = []
    for start in range(0, len(base), columns):
        old, new = base[start : start + columns], model[start : start + columns]
        p, q = [x + 1e-8 for x in softmax(new)], [x + 1e-8 for x in softmax(old)]
        divergence = max(0.0, math.fsum(x * math.log(x / y) for x, y in zip(p, q, strict=True)))
        importance += [abs(x - y) * divergence for x, y in zip(new, old, strict=True)]
    first, median, third = (sorted(importance)[int(share * (len(base) - 1))] for share in (0.25, 0.5, 0.75))
    threshold = median + iqr_factor * (third - first)
    return [x if i >= threshold else b for b, x, i in zip(base, model, importance, strict=True)]
