"""What calibration gathers of an input, and what methods make of it: the Gram matrix, and its factors.

A Gram matrix is the mean of x xᵀ over the calibration tokens x. By it the error that a change E of a linear's weights
makes in its output is known without the tokens: the mean of |E x|² is tr(E G Eᵀ).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import RuntimeProblem
from .products import in_bfloat16, in_float32

_STRIPES = 4  # or more; a symmetric product is made in stripes, each from its diagonal on: at most 5/8 of the whole
_WIDTH = 256  # of a stripe on the processor, at most: 0.56 to 0.7 of the time of the whole at 576 to 4096 features
_TOKENS = 1024  # that the processor multiplies at a time: no copy of a whole batch in float32
_IN_CACHE = 256  # that it takes the squares of
FIRST = 4  # lengths of a median token that the first of a window has at least
SHORTEST = 1e-6  # square of a token, of the median's, that is made as long as that; shorter ones stay shorter
_BLOCK = 384  # columns of a Cholesky factor at a time


class Gram:
    """The sum of x xᵀ over tokens, as it grows.

    lifted:  short tokens are made longer first, that of each window's beginning above all (see `lifts`)
    tokens:  how many were added, those dropped not among them
    dropped: how many were left out because a value of theirs was not finite
    """

    def __init__(self, features: int, device: torch.device | str = "cpu", *, lifted: bool = False) -> None:
        self._lifted = lifted
        self._sum = torch.zeros(features, features, device=device)  # right as far as the stripes reach
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)  # on the device, so that nobody waits for it

    @property
    def tokens(self) -> int:
        return int(self._counts[0])

    @property
    def dropped(self) -> int:
        return int(self._counts[1])

    def add(self, inputs: Tensor, mask: Tensor | None = None) -> None:
        """Add tokens.

        inputs: [..., features], of any float type, on the device of the sum
        mask:   bool [...], True where a token counts
        """
        factors = None
        if self._lifted:
            factors = lifts(inputs if mask is None else inputs.masked_fill(~mask[..., None], torch.nan))
        for rows, counts in _counted(inputs, mask, _TOKENS, factors):
            self._counts += counts
            with _multiplying(inputs):
                self._add_products(rows)

    def _add_products(self, rows: Tensor) -> None:
        for begin, end in _stripes(self._sum):
            _add_product(self._sum[begin:end, begin:], rows[:, begin:end].t(), rows[:, begin:])

    def sums(self) -> list[Tensor]:
        """What is to be added up, in place, with that of other tokens."""
        return [self._sum, self._counts]

    def finish(self) -> Tensor:
        """The mean of x xᵀ, float32 [features, features], exactly symmetric; zeros where there was no token.

        It is made in the memory of the sum, to which nothing can be added afterwards.
        """
        total, self._sum = self._sum, torch.empty(0)
        for begin, end in _stripes(total):
            square = total[begin:end, begin:end]
            square.copy_(square.triu() + square.triu(1).t())
            total[end:, begin:end] = total[begin:end, end:].t()
        return total.div_(self._counts[0].clamp(min=1))


class CrossGram(Gram):
    """A Gram matrix, and beside it the sum of (y - x) xᵀ, where y is what x was before anything was changed.

    All tokens are added by `add_pair`, or, where it is not known what they were, all by `add`.
    """

    def __init__(self, features: int, device: torch.device | str = "cpu", *, lifted: bool = False) -> None:
        super().__init__(features, device, lifted=lifted)
        self._cross = torch.zeros(features, features, device=device)  # of y xᵀ
        self._paired = False

    def add_pair(self, inputs: Tensor, before: Tensor) -> None:
        """Add tokens as they are and as they were, [..., features] of one type, on the device of the sums.

        Those that are lifted are so by their length as they are.
        """
        self._paired = True
        factors = lifts(inputs) if self._lifted else None
        for rows, counts in _counted(torch.cat([inputs, before], dim=-1), None, _TOKENS, factors):
            self._counts += counts
            now, then = rows.chunk(2, dim=1)
            with _multiplying(inputs):
                self._add_products(now)
                _add_product(self._cross, then.t(), now)

    def sums(self) -> list[Tensor]:
        return [*super().sums(), self._cross]

    def finish_both(self) -> tuple[Tensor, Tensor | None]:
        """The means of x xᵀ and, of pairs, of (y - x) xᵀ, float32 [features, features], made as by `finish`."""
        gram = self.finish()
        cross, self._cross = self._cross, torch.empty(0)
        return gram, None if not self._paired else cross.div_(self._counts[0].clamp(min=1)).sub_(gram)


class Moments:
    """The sums of |x| and of x² of each feature over tokens, as they grow: what a Gram matrix has on its diagonal."""

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        self._absolute = torch.zeros(features, dtype=torch.float64, device=device)
        self._squares = torch.zeros(features, dtype=torch.float64, device=device)
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)

    @property
    def tokens(self) -> int:
        return int(self._counts[0])

    @property
    def dropped(self) -> int:
        return int(self._counts[1])

    def add(self, inputs: Tensor, mask: Tensor | None = None) -> None:
        """Add tokens, as `Gram.add` does."""
        absolute, squares = self._absolute.new_zeros(2, len(self._absolute), dtype=torch.float32)
        for rows, counts in _counted(inputs, mask, _IN_CACHE):
            self._counts += counts
            rows = rows.float()
            ones = rows.new_ones(len(rows))  # products with them: a tenth of the time of torch's norms by column
            absolute.addmv_(rows.abs().t(), ones)
            squares.addmv_(rows.square().t(), ones)
        self._absolute += absolute
        self._squares += squares

    def sums(self) -> list[Tensor]:
        """What is to be added up, in place, with that of other tokens."""
        return [self._absolute, self._squares, self._counts]

    @property
    def mean_absolute(self) -> Tensor:
        """The mean of |x|, float32 [features]."""
        return (self._absolute / self._counts[0].clamp(min=1)).float()

    @property
    def mean_square(self) -> Tensor:
        """The mean of x², float32 [features]."""
        return (self._squares / self._counts[0].clamp(min=1)).float()


def lifts(inputs: Tensor) -> Tensor:
    """What makes short tokens longer, float32 [tokens, 1], at least 1: each is brought to the median length of its
    window, and the first of a window to FIRST times that.

    inputs: [windows, tokens, features], of any float type; where there are no windows, all tokens are taken for one
            without a first

    All tokens attend to the first of their window, whose activations become hundreds of times as long as others' within
    a few blocks, nearly all of it in a few features (Sun et al., "Massive Activations in Large Language Models", 2024,
    https://arxiv.org/abs/2402.17762) on which norms have small weights. So what comes out of a norm is short for just
    this token, a tenth to a hundredth of the others' squares, and in a mean over tokens an error in it would be next to
    nothing. Longer ones are left as they are: the first is what makes that length in down_proj.
    """
    tokens = inputs.shape[:-1].numel()
    if tokens == 0:
        return inputs.new_ones(0, 1, dtype=torch.float32)
    windows = inputs.detach() if inputs.ndim == 3 else inputs.detach().reshape(1, tokens, -1)
    squares = torch.stack([torch.linalg.vector_norm(window.float(), dim=-1).square() for window in windows])
    median = squares.where(squares.isfinite(), torch.nan).nanmedian(dim=1, keepdim=True).values
    lengths = (median / squares.maximum(SHORTEST * median)).sqrt()
    if inputs.ndim == 3:
        lengths[:, 0] *= FIRST
    return lengths.where(lengths.isfinite(), 1).clamp(min=1).reshape(-1, 1)


def _counted(
    inputs: Tensor, mask: Tensor | None, together: int, factors: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens as rows, those that do not count set to zero; and how many count, and how many are not finite.

    factors: float32 [tokens, 1], of each token; the products are of the type of the inputs

    On the processor so many tokens at a time, in float32. On a GPU all; 16-bit floats stay: their products are exact.
    """
    tokens = inputs.detach().reshape(-1, inputs.shape[-1])
    asked = None if mask is None else mask.reshape(-1)
    if tokens.is_cuda:
        short = tokens.dtype in (torch.float16, torch.bfloat16)
        rows = tokens if factors is None else (tokens.float() * factors).to(tokens.dtype)
        yield _counted_rows(rows if short else rows.float(), asked)
        return
    for begin in range(0, len(tokens), together):
        some = slice(begin, begin + together)
        rows = tokens[some].float()
        if factors is not None:
            rows = (rows * factors[some]).to(tokens.dtype).float()
        flat = rows.reshape(-1)
        if asked is None and bool(torch.dot(flat, flat).isfinite()):
            yield rows, torch.tensor([len(rows), 0])  # all that nearly every batch needs
        else:
            yield _counted_rows(rows, None if asked is None else asked[some])


def _counted_rows(rows: Tensor, asked: Tensor | None) -> tuple[Tensor, Tensor]:
    finite = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32).isfinite()  # in float32 a sum of squares
    keep = finite if asked is None else finite & asked
    lost = ~finite if asked is None else asked & ~finite
    if rows.is_cuda or not bool(keep.all()):
        rows = torch.where(keep[:, None], rows, 0)
    return rows, torch.stack([keep.sum(), lost.sum()])


def _stripes(matrix: Tensor) -> Iterator[tuple[int, int]]:
    size = len(matrix)
    width = max(64, -(-size // _STRIPES))
    width = width if matrix.is_cuda else min(_WIDTH, width)
    return ((begin, min(begin + width, size)) for begin in range(0, size, width))


def _add_product(target: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == torch.float32:
        target.addmm_(left, right)
    else:  # the products of 16-bit floats are exact in float32
        target.add_(torch.mm(left, right, out_dtype=torch.float32))


@contextmanager
def _multiplying(inputs: Tensor) -> Iterator[None]:
    """How float32 copies of inputs are multiplied: of bfloat16 ones exactly, in half the time where there are units."""
    with in_bfloat16() if inputs.dtype == torch.bfloat16 and not inputs.is_cuda else _tf32():
        yield


@contextmanager
def _tf32() -> Iterator[None]:
    """Let float32 products on a GPU be made of 11-bit mantissas, and added up in float32."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@dataclass(frozen=True)
class Factor:
    """A damped Gram matrix as A diag(pivots) Aᵀ, A unit upper triangular.

    A pivot is what is left of an input's mean square when the inputs after it are used to predict it, all inputs
    being in the order that was asked for.
    """

    upper: Tensor  # A, [features, features]
    pivots: Tensor  # [features], positive
    dead: Tensor  # bool [features], in the natural order: inputs that were 0 at every token
    damping: float  # what was added to the diagonal, as a share of the diagonal's mean


def factor(gram: Tensor, *, damping: float, permutation: Tensor | None = None) -> Factor | None:
    """Factor a Gram matrix, with more damping where the asked one is not enough.

    gram:        [features, features], symmetric; the factor has its float type
    damping:     share of the diagonal's mean to add to the diagonal, at least 0; tried ten times as much again and
                 again, at most 1
    permutation: int64 [features], the order of the features; None for the natural one

    returns: None where no damping makes the matrix positive definite
    raises: RuntimeProblem where a value of the matrix is not finite
    """
    _refuse_nonfinite(gram)
    diagonal = gram.diagonal()
    dead = diagonal == 0
    mean = torch.where(dead, 1, diagonal).mean()
    order = torch.arange(len(gram), device=gram.device) if permutation is None else permutation
    for share in _ladder(damping):
        matrix = gram.index_select(0, order).index_select(1, order)
        matrix.diagonal().add_(share * mean + dead[order].to(gram.dtype))
        if _root(matrix):
            roots = matrix.diagonal().clone()
            return Factor(matrix.triu_().div_(roots), roots.square_(), dead, share)
    return None


def _root(matrix: Tensor) -> bool:
    """Replace a matrix M by upper triangular R, M = R Rᵀ, and tell whether there is one; only M's upper part is used.

    In blocks from the last to the first: on the processor about twice as fast as LAPACK on the whole.
    """
    block = _BLOCK if matrix.device.type == "cpu" else len(matrix)
    for end in range(len(matrix), 0, -block):
        begin = max(0, end - block)
        corner, above = matrix[begin:end, begin:end], matrix[:begin, begin:end]
        root, info = torch.linalg.cholesky_ex(corner.flip(0, 1))
        if info.item() or not bool(root.diagonal().isfinite().all()):
            return False
        corner.copy_(root.flip(0, 1))
        if begin:
            above.copy_(torch.linalg.solve_triangular(corner.t(), above, upper=False, left=False))
            for left, right in _stripes(matrix[:begin]):
                matrix[:right, left:right].addmm_(above[:right], above[left:right].t(), alpha=-1)
    return True


def _refuse_nonfinite(gram: Tensor) -> None:
    # a sum is not finite if a term is not; where it only overflows, the second look finds nothing
    if not bool(gram.sum().isfinite()) and not bool(gram.isfinite().all()):
        row, column = (~gram.isfinite()).nonzero()[0].tolist()
        raise RuntimeProblem(
            f"the Gram matrix has {gram[row, column].item()} at row {row}, column {column}; "
            "statistics must be finite: calibrate anew, in a wider float type if activations overflow"
        )


def _ladder(damping: float) -> Iterator[float]:
    """The damping asked for, then ten times as much up to 1; after none, a thousandth."""
    while True:
        yield damping
        if damping >= 1:
            return
        damping = min(1.0, damping * 10) if damping > 0 else 1e-3


@dataclass(frozen=True)
class Errors:
    """How far an approximation of a linear's weights is from them; 0 is exact, 1 is as far as zeros are."""

    weight: float  # |W - Q| / |W|, Frobenius norms
    output: float  # the same of the outputs over the calibration tokens: |(W - Q) X| / |W X|


def relative_errors(weight: Tensor, gram: Tensor, approximations: list[Tensor]) -> list[Errors]:
    """The errors of approximations [out, in] of a weight [out, in] whose inputs have a Gram matrix [in, in]."""
    weight = weight.float()
    scale, energy = _square(weight), _output_square(weight, gram)
    found = []
    for approximation in approximations:
        error = weight - approximation
        found.append(Errors(_ratio(_square(error), scale), _ratio(_output_square(error, gram), energy)))
    return found


def output_squares(errors: Tensor, gram: Tensor) -> Tensor:
    """The mean of (e x)² for each row e of errors, float32 [out]: the diagonal of E G Eᵀ.

    errors: float32 [out, in]
    gram:   float32 [in, in], symmetric: each number beside the diagonal is taken once, and counted twice
    """
    total = errors.new_zeros(len(errors))
    for begin, end in _stripes(gram):
        own, rest = errors[:, begin:end], errors[:, end:]
        with in_float32():
            products = own @ gram[begin:end, begin:end]
            products.addmm_(rest, gram[end:, begin:end], alpha=2)
        total += products.mul_(own).sum(dim=1)
    return total


def _square(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dim=1).double().square().sum())


def _output_square(matrix: Tensor, gram: Tensor) -> float:
    with _tf32():
        return max(0.0, float(output_squares(matrix, gram).sum(dtype=torch.float64)))


def _ratio(part: float, whole: float) -> float:
    return (part / whole) ** 0.5 if whole else 0.0
