"""The merge methods written as slowly and plainly as their papers have them: loops over elements, in float64.

Each takes and returns nested nothing: flat lists of Python floats, one list a model.
"""

import math

import numpy as np


def mask(key, density, elements):
    """Which elements DARE keeps: those whose 16 bits of the key's stream are below the density in units of 2^-16."""
    drawn = np.random.PCG64DXSM(key).random_raw(elements // 4 + 1).view(np.uint16)[:elements]
    return drawn < round(density * 65536)


def linear(models, *, weight, normalize=True):
    total = sum(weight) if normalize else 1.0
    return [sum(w * model[i] for w, model in zip(weight, models, strict=True)) / total for i in range(len(models[0]))]


def slerp(models, *, t):
    a, b = models
    length_a = math.sqrt(math.fsum(x * x for x in a))
    length_b = math.sqrt(math.fsum(x * x for x in b))
    if length_a == 0 or length_b == 0:
        return [(1 - t) * x + t * y for x, y in zip(a, b, strict=True)]
    cosine = math.fsum(x * y for x, y in zip(a, b, strict=True)) / (length_a * length_b)
    if abs(cosine) > 0.9995:
        return [(1 - t) * x + t * y for x, y in zip(a, b, strict=True)]
    angle = math.acos(cosine)
    first, second = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    return [first * x + second * y for x, y in zip(a, b, strict=True)]


def trimmed(vector, density):
    """All but the int(density * n) largest magnitudes set to 0; of equal ones the earlier are kept."""
    keep = round(density * len(vector) * 1e9) // 10**9
    keep = max(keep, 1) if density > 0 else 0
    order = sorted(range(len(vector)), key=lambda i: (-abs(vector[i]), i))
    kept = set(order[:keep])
    return [x if i in kept else 0.0 for i, x in enumerate(vector)]


def task_vectors(base, models):
    return [[x - b for x, b in zip(model, base, strict=True)] for model in models]


def summed(base, vectors, *, weight, normalize, lambda_):
    total = sum(weight) if normalize else 1.0
    if abs(total) < 1e-8:
        total = 1.0
    return [
        b + lambda_ * sum(w * v[i] for w, v in zip(weight, vectors, strict=True)) / total for i, b in enumerate(base)
    ]


def elected(base, vectors, *, weight, normalize, lambda_):
    out = []
    for i, b in enumerate(base):
        weighed = [w * v[i] for w, v in zip(weight, vectors, strict=True)]
        sign = 1.0 if sum(weighed) >= 0 else -1.0
        agreeing = [(d, w) for d, w in zip(weighed, weight, strict=True) if d * sign > 0]
        total = sum(w for _, w in agreeing)
        divisor = total if normalize and total != 0 else 1.0
        out.append(b + lambda_ * sum(d for d, _ in agreeing) / divisor)
    return out


def l1(vector):
    return math.fsum(abs(x) for x in vector)


def ties(base, models, *, weight, density, normalize=True, rescale=False, lambda_=1.0):
    vectors = []
    for vector, share in zip(task_vectors(base, models), density, strict=True):
        thin = trimmed(vector, share)
        factor = l1(vector) / l1(thin) if rescale and l1(thin) else 1.0
        vectors.append([x * factor for x in thin])
    return elected(base, vectors, weight=weight, normalize=normalize, lambda_=lambda_)


def task_arithmetic(base, models, *, weight, normalize=False, lambda_=1.0):
    return summed(base, task_vectors(base, models), weight=weight, normalize=normalize, lambda_=lambda_)


def dare(base, models, *, masks, weight, density, rescale, elect, normalize=False, lambda_=1.0):
    vectors = []
    for vector, mask, share in zip(task_vectors(base, models), masks, density, strict=True):
        thin = [x if keep else 0.0 for x, keep in zip(vector, mask, strict=True)]
        factor = 1.0
        if rescale == "density" and share > 0:
            factor = 1.0 / share
        if rescale == "l1" and l1(thin) and l1(vector):
            factor = l1(vector) / l1(thin)
        vectors.append([x * factor for x in thin])
    merge = elected if elect else summed
    return merge(base, vectors, weight=weight, normalize=normalize, lambda_=lambda_)
