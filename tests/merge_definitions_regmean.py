"""RegMean as the paper writes it, in float64 with loops: lists of rows in and out, weights as x W with W [in][out]."""


def transposed(matrix):
    return [list(column) for column in zip(*matrix, strict=True)]


def product(left, right):
    columns = transposed(right)
    return [[sum(x * y for x, y in zip(row, column, strict=True)) for column in columns] for row in left]


def solved(matrix, right):
    """matrix^-1 right, by elimination with the largest pivot of each column."""
    size = len(matrix)
    rows = [list(a) + list(b) for a, b in zip(matrix, right, strict=True)]
    for column in range(size):
        best = max(range(column, size), key=lambda i: abs(rows[i][column]))
        rows[column], rows[best] = rows[best], rows[column]
        for i in range(size):
            if i != column:
                ratio = rows[i][column] / rows[column][column]
                rows[i] = [a - ratio * b for a, b in zip(rows[i], rows[column], strict=True)]
    return [[value / rows[i][i] for value in rows[i][size:]] for i in range(size)]


def gram(inputs):
    """The mean of x xᵀ over the rows of inputs."""
    return [[value / len(inputs) for value in row] for row in product(transposed(inputs), inputs)]


def regmean(inputs, models, *, weight, alpha, damping=0.0):
    """(sum_i w_i G_i)^-1 sum_i w_i G_i W_i, off-diagonals of G_i by alpha, each diagonal damped by the same amount.

    inputs: one list of rows [tokens][in] a model; models: [in][out] each
    """
    shares = [each / sum(weight) for each in weight]
    size = range(len(models[0]))
    grams = [gram(rows) for rows in inputs]
    diagonal = [sum(share * g[j][j] for share, g in zip(shares, grams, strict=True)) for j in size]
    alive = [value for value in diagonal if value > 0]
    extra = damping * sum(diagonal[j] if diagonal[j] > 0 else 1.0 * sum(alive) / len(alive) for j in size) / len(size)
    grams = [[[g[i][j] + extra if i == j else alpha * g[i][j] for j in size] for i in size] for g in grams]
    left = [[sum(s * g[i][j] for s, g in zip(shares, grams, strict=True)) for j in size] for i in size]
    products = [product(g, model) for g, model in zip(grams, models, strict=True)]
    columns = range(len(models[0][0]))
    right = [[sum(s * p[i][j] for s, p in zip(shares, products, strict=True)) for j in columns] for i in size]
    return solved(left, right)


def objective(inputs, models, merged, *, weight):
    """sum_i w_i mean |x W - x W_i|² over the rows x of model i."""
    total = 0.0
    for rows, model, factor in zip(inputs, models, weight, strict=True):
        one, other = product(rows, merged), product(rows, model)
        squares = sum((a - b) ** 2 for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))
        total += factor / sum(weight) * squares / len(rows)
    return total


def mean(models, *, weight):
    total = sum(weight)
    size, columns = range(len(models[0])), range(len(models[0][0]))
    return [[sum(w * m[i][j] for w, m in zip(weight, models, strict=True)) / total for j in columns] for i in size]
