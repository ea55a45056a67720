"""Pruning written as slowly and plainly as the papers have it: loops over numbers, in float64.

Matrices are lists of rows of Python floats; masks lists of rows of bools, True where the weight stays.
"""

import torch
from quantization_definitions import damped


def without_lowest(scores, drop):
    """A list with False for the `drop` lowest; of equal ones the first go."""
    order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    return [i not in order[:drop] for i in range(len(scores))]


def by_row(scores, drop):
    return [without_lowest(row, drop) for row in scores]


def by_matrix(scores, drop):
    """The same over all rows, one after the other."""
    columns = len(scores[0])
    flat = without_lowest([score for row in scores for score in row], drop)
    return [flat[i * columns : (i + 1) * columns] for i in range(len(scores))]


def by_pattern(scores, kept, of):
    """N kept of every M neighbours; a tail stays."""
    masks = []
    for row in scores:
        mask = []
        for begin in range(0, len(row), of):
            group = row[begin : begin + of]
            mask += without_lowest(group, of - kept) if len(group) == of else [True] * len(group)
        masks.append(mask)
    return masks


def wanda(weight, norm):
    return [[abs(w) * norm[j] for j, w in enumerate(row)] for row in weight]


def ria(weight, norm, power):
    rows, columns = range(len(weight)), range(len(norm))
    of_row = [sum(abs(weight[i][j]) for j in columns) or 1.0 for i in rows]
    of_column = [sum(abs(weight[i][j]) for i in rows) or 1.0 for j in columns]
    return [
        [(abs(weight[i][j]) / of_column[j] + abs(weight[i][j]) / of_row[i]) * norm[j] ** power for j in columns]
        for i in rows
    ]


def sparsegpt(weight, gram, damping, choose, block, quantize=None):
    """Algorithm 1 of the SparseGPT paper: weights that are left, and the mask.

    choose:   called with (first column, scores of the columns of a block as they stand) -> mask; scores are
              w² / U[j, j]²
    block:    columns that are chosen at a time
    quantize: (row, column, value) -> rounded value
    """
    columns, rows = range(len(gram)), range(len(weight))
    dead = [gram[j][j] == 0 for j in columns]
    inverse = torch.tensor(damped(gram, damping), dtype=torch.float64).inverse()
    u = torch.linalg.cholesky(inverse, upper=True).tolist()
    w = [[0.0 if dead[j] else value for j, value in enumerate(row)] for row in weight]
    mask = [[True] * len(gram) for _ in rows]
    for j in columns:
        if j % block == 0:
            part = range(j, min(j + block, len(gram)))
            chosen = choose(j, [[w[i][k] ** 2 / u[k][k] ** 2 for k in part] for i in rows])
            for i in rows:
                mask[i][part.start : part.stop] = chosen[i]
        for i in rows:
            left = w[i][j] if mask[i][j] else 0.0
            left = quantize(i, j, left) if quantize and mask[i][j] else left
            error = (w[i][j] - left) / u[j][j]
            for k in range(j + 1, len(gram)):
                w[i][k] -= error * u[j][k]
            w[i][j] = left
    return w, mask
