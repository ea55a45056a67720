"""The merge methods that mask task vectors, written as plainly as merge_definitions.py has the others."""

import math
from fractions import Fraction
from statistics import pvariance

from merge_definitions import elected, l1, summed, task_vectors


def count(share, elements):
    return math.floor(Fraction(str(share)) * elements)


def without_ends(vector, density, gamma):
    """From the largest magnitude on, of equal ones the earlier first: drop gamma, keep density, drop the rest."""
    keep = max(count(density, len(vector)), 1) if density > 0 else 0
    outliers = min(count(gamma, len(vector)), len(vector) - keep)
    order = sorted(range(len(vector)), key=lambda i: (-abs(vector[i]), i))
    kept = set(order[outliers : outliers + keep])
    return [x if i in kept else 0.0 for i, x in enumerate(vector)]


def with_length_of(vector, thin):
    factor = l1(vector) / l1(thin) if l1(thin) and l1(vector) else 1.0
    return [x * factor for x in thin]


def _breadcrumbs(merge, base, models, *, weight, density, gamma, normalize, rescale, lambda_):
    vectors = []
    for vector, share, outliers in zip(task_vectors(base, models), density, gamma, strict=True):
        thin = without_ends(vector, share, outliers)
        vectors.append(with_length_of(vector, thin) if rescale else thin)
    return merge(base, vectors, weight=weight, normalize=normalize, lambda_=lambda_)


def breadcrumbs(base, models, *, weight, density, gamma, normalize=False, rescale=False, lambda_=1.0):
    options = {"normalize": normalize, "rescale": rescale, "lambda_": lambda_}
    return _breadcrumbs(summed, base, models, weight=weight, density=density, gamma=gamma, **options)


def breadcrumbs_ties(base, models, *, weight, density, gamma, normalize=False, rescale=False, lambda_=1.0):
    options = {"normalize": normalize, "rescale": rescale, "lambda_": lambda_}
    return _breadcrumbs(elected, base, models, weight=weight, density=density, gamma=gamma, **options)


def keep_probability(rank, columns, density, epsilon):
    """Of the element of a rank, from 0 for the smallest magnitude, in 65536ths."""
    epsilon = min(epsilon, density, 1 - density)
    place = rank / (columns - 1) if columns > 1 else 0.5
    return round((density - epsilon + 2 * epsilon * place) * 65536)


def sampled_by_rank(vector, numbers, columns, density, epsilon, scaled):
    """Keep the element of a rank where the row's random number of that rank is below its probability."""
    thin = [0.0] * len(vector)
    for row in range(0, len(vector), columns):
        order = sorted(range(row, row + columns), key=lambda i: (abs(vector[i]), i))
        for rank, i in enumerate(order):
            level = keep_probability(rank, columns, density, epsilon)
            if numbers[row + rank] < level:
                thin[i] = vector[i] * (65536 / level if scaled else 1.0)
    return thin


def _della(
    merge, base, models, *, numbers, columns, weight, density, epsilon, rescale="density", normalize, lambda_=1.0
):
    vectors = []
    for vector, own, share, spread in zip(task_vectors(base, models), numbers, density, epsilon, strict=True):
        thin = sampled_by_rank(vector, own, columns, share, spread, rescale == "density")
        vectors.append(with_length_of(vector, thin) if rescale == "l1" else thin)
    return merge(base, vectors, weight=weight, normalize=normalize, lambda_=lambda_)


def della(base, models, *, normalize=True, **options):
    return _della(elected, base, models, normalize=normalize, **options)


def della_linear(base, models, *, normalize=False, **options):
    return _della(summed, base, models, normalize=normalize, **options)


def sce(base, models, *, select_topk=1.0):
    elements = range(len(base))
    vectors = task_vectors(base, models)
    if select_topk < 1:
        variance = [pvariance([model[i] for model in models]) for i in elements]
        keep = count(select_topk, sum(v != 0 for v in variance))
        selected = set(sorted(elements, key=lambda i: (-variance[i], i))[:keep])
        vectors = [[x if i in selected else 0.0 for i, x in enumerate(vector)] for vector in vectors]
    squares = [math.fsum(x * x for x in vector) for vector in vectors]
    shares = [s / sum(squares) if sum(squares) else 1.0 for s in squares]
    out = []
    for i in elements:
        sign = 1.0 if sum(vector[i] for vector in vectors) >= 0 else -1.0
        agreeing = [(vector[i], share) for vector, share in zip(vectors, shares, strict=True) if vector[i] * sign > 0]
        total = sum(share for _, share in agreeing)
        out.append(base[i] + (sum(x * share for x, share in agreeing) / total if total else 0.0))
    return out


def ram(base, models, *, epsilon=1e-5):
    return ramplus_tl(base, models, r=0.0, epsilon=epsilon)


def ramplus_tl(base, models, *, r=0.1, alpha=0.2, epsilon=1e-5):
    vectors = task_vectors(base, models)
    changers = [[k for k, vector in enumerate(vectors) if abs(vector[i]) > epsilon] for i in range(len(base))]
    factors = []
    for k in range(len(models)):
        unique = sum(who == [k] for who in changers)
        shared = sum(k in who and len(who) > 1 for who in changers)
        factors.append(1 + r * min(shared / unique if unique else 0.0, alpha))
    out = []
    for i, who in enumerate(changers):
        change = sum(vectors[k][i] for k in who) / max(len(who), 1)
        out.append(base[i] + (change * factors[who[0]] if len(who) == 1 else change))
    return out
