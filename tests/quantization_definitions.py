"""Quantization written as slowly and plainly as the papers have it: loops over numbers, in float64.

Matrices are lists of rows of Python floats; a grid is (lowest code, highest code, width of a group, symmetric).
"""

import torch


def layer(rows, columns, *, seed=0, tokens=None, spread=1.0, dtype=torch.float32):
    """A weight and the Gram matrix of correlated inputs of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + torch.randn(columns, columns, generator=generator) * 0.7 / columns**0.5
    size = torch.exp(spread * torch.randn(columns, generator=generator))
    inputs = torch.randn(tokens or 4 * columns, columns, generator=generator) @ mix * size
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    return weight.to(dtype), inputs.T @ inputs / len(inputs)


def stored(x, dtype):
    """A number as a tensor of this type holds it."""
    return torch.tensor(x, dtype=torch.float64).to(dtype).item()


def lists(tensor):
    return tensor.double().tolist()


def nearest(w, scale, zero, lowest, highest):
    """The code whose value is nearest, by looking at all of them; of two as near, the even one (as IEEE rounds)."""
    codes = sorted(range(lowest, highest + 1), key=lambda code: (abs((code - zero) * scale - w), code % 2))
    return codes[0]


def full_range(group, lowest, highest, symmetric, dtype):
    """Scale and zero with which no weight of the group is far outside the grid."""
    if symmetric:
        largest = max(group, key=lambda w: (abs(w), -w))
        return (stored(largest / lowest, dtype) if largest else 1.0), 0
    low, high = min(*group, 0.0), max(*group, 0.0)
    if low == high:
        return 1.0, lowest
    scale = stored((high - low) / (highest - lowest), dtype)
    return scale, min(max(round(lowest - low / scale), lowest), highest)


def distance(group, scale, zero, lowest, highest, norm):
    """The sum of |weight - rounded| ** norm."""
    return sum(abs((nearest(w, scale, zero, lowest, highest) - zero) * scale - w) ** norm for w in group)


def rtn(weight, lowest, highest, width, symmetric, dtype):
    """Codes, scales and zeros of a matrix."""
    codes, scales, zeros = [], [], []
    for row in weight:
        groups = [row[begin : begin + width] for begin in range(0, len(row), width)]
        found = [full_range(group, lowest, highest, symmetric, dtype) for group in groups]
        scales.append([scale for scale, _ in found])
        zeros.append([zero for _, zero in found])
        codes.append([nearest(w, *found[i // width], lowest, highest) for i, w in enumerate(row)])
    return codes, scales, zeros


def damped(gram, damping):
    """1 on the diagonal for inputs that were never anything but 0, then a share of the diagonal's mean on all of it."""
    size = range(len(gram))
    diagonal = [gram[i][i] if gram[i][i] else 1.0 for i in size]
    mean = sum(diagonal) / len(gram)
    return [[diagonal[i] + damping * mean if i == j else gram[i][j] for j in size] for i in size]


def inverse(matrix):
    """By Gauss and Jordan, without pivoting: for positive definite matrices."""
    size = len(matrix)
    rows = [[*row, *(float(i == j) for j in range(size))] for i, row in enumerate(matrix)]
    for i in range(size):
        rows[i] = [x / rows[i][i] for x in rows[i]]
        for j in range(size):
            if j != i:
                rows[j] = [x - rows[j][i] * y for x, y in zip(rows[j], rows[i], strict=True)]
    return [row[size:] for row in rows]


def without(matrix, q):
    """The inverse of H without row and column q, from the inverse of H (equation 3 of the paper)."""
    size = range(len(matrix))
    return [[matrix[i][j] - matrix[i][q] * matrix[q][j] / matrix[q][q] for j in size] for i in size]


def obq(row, gram, order, round_weight, before=None):
    """Optimal Brain Quantization of one row, in a given order of its weights (equation 2 of the GPTQ paper).

    gram:         positive definite
    round_weight: (index, value) -> rounded value
    before:       called with (index, the row as it stands) before each weight is rounded

    returns: rounded values
    """
    row, left = list(row), inverse(gram)
    done = set()
    for q in order:
        if before:
            before(q, row)
        rounded = round_weight(q, row[q])
        error = (row[q] - rounded) / left[q][q]
        done.add(q)
        row = [rounded if i == q else w if i in done else w - error * left[q][i] for i, w in enumerate(row)]
        left = without(left, q) if len(done) < len(row) else left
    return row


def output_error(error, gram):
    """tr(E G Eᵀ) of rows of errors."""
    size = range(len(gram))
    return sum(row[i] * gram[i][j] * row[j] for row in error for i in size for j in size)


def awq_scales(size, share, exponent, duo):
    """Scales of AWQ, as its authors' code has them: no feature's mean below 1e-4, and around 1 in the end."""
    scales = [max(x, 1e-4) ** exponent for x in size]
    if duo:
        scales = [s / (w ** (1 - exponent) + 1e-4) for s, w in zip(scales, share, strict=True)]
    scales = [max(s, 1e-4) for s in scales]
    middle = (max(scales) * min(scales)) ** 0.5
    return [s / middle for s in scales]


def awq_share(weight, width):
    """The mean over rows of |weight| over the largest in its group."""
    shares = [0.0] * len(weight[0])
    for row in weight:
        for i, w in enumerate(row):
            begin = i // width * width
            largest = max(abs(other) for other in row[begin : begin + width])
            shares[i] += abs(w) / largest / len(weight) if largest else 0.0
    return shares


def awq_error(weight, gram, scales, lowest, highest, width, symmetric, dtype):
    """The squared error of the output, as a share of its square, of a matrix rounded with its columns scaled."""
    scaled = [[w * s for w, s in zip(row, scales, strict=True)] for row in weight]
    codes, steps, zeros = rtn(scaled, lowest, highest, width, symmetric, dtype)
    off = [
        [(codes[r][i] - zeros[r][i // width]) * steps[r][i // width] / scales[i] - w for i, w in enumerate(row)]
        for r, row in enumerate(weight)
    ]
    return output_error(off, gram) / output_error(weight, gram)


def awq_clipped(row, gram, begin, end, shares, lowest, highest, symmetric, dtype):
    """The least squared error of one group's part of the output, of all shares of its range."""
    group = row[begin:end]
    largest = max(abs(w) for w in group)
    errors = []
    for share in shares:
        cut = [min(max(w, -largest * share), largest * share) for w in group]
        scale, zero = full_range(cut, lowest, highest, symmetric, dtype)
        off = [(nearest(w, scale, zero, lowest, highest) - zero) * scale - w for w in group]
        errors.append(output_error([off], [line[begin:end] for line in gram[begin:end]]))
    return min(errors)
