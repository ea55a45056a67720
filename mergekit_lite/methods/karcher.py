"""Karcher mean: the direction with the least squared angles to the models' directions, at the mean of their lengths.

Karcher, "Riemannian center of mass and mollifier smoothing", 1977, https://doi.org/10.1002/cpa.3160300502; on the
sphere, with weights, by the steps of Buss and Fillmore, "Spherical averages and applications to spherical splines and
interpolation", 2001, https://doi.org/10.1145/502122.502124 (algorithm A1). From the mean m of the directions u_i, turn
m by the mean of the arcs that lead to them until it no longer moves:

    v = sum_i w_i a_i / sin(a_i) (u_i - cos(a_i) m),   a_i the angle between m and u_i
    m <- cos|v| m + sin|v| v / |v|

    out = sum_i w_i |theta_i| * m
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from wtool.errors import UsageError
from wtool.pieces import InPieces, Pieces

from ..arithmetic.gram import combine, cosines

NO_ARC = 1e-7  # the sine of an angle near 0 or pi, where the arc to a direction is nothing or could be any


@InPieces
def karcher(
    models: Sequence[Tensor],
    *,
    weight: Sequence[float] | None = None,
    max_iter: int = 10,
    tol: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> Pieces:
    """Return the mean on the sphere of tensors of one shape, each taken as one vector.

    weight:   one a model, 0 or more, only their ratios count; equal ones if None
    max_iter: most steps
    tol:      in radians: a shorter step is the last; also the least length of the directions' mean to start from

    Where the directions cancel (opposite vectors, for which every direction between is as good), it starts from the
    first model of a length and weight, and for two opposite models stays there. A zero tensor has no direction, and
    counts in the length. raises: UsageError if all weights are 0
    """
    weight = [1.0] * len(models) if weight is None else weight
    if not sum(weight):
        raise UsageError("karcher: the weights sum to 0; a mean needs a model with a weight above 0")
    shares = torch.tensor(weight, dtype=torch.float64) / sum(weight)

    def factors(gram: Tensor) -> Tensor:
        length, cosine = cosines(gram[0])
        mass = torch.where(length > 0.0, shares, 0.0)
        if not mass.any():
            return torch.zeros(1, len(models), dtype=torch.float64)
        mean = _mean_direction(cosine, mass / mass.sum(), max_iter, tol)
        return torch.where(length > 0.0, mean * (shares @ length) / length, 0.0)[None]

    return combine(None, models, factors, dtype=dtype)


def _mean_direction(cosine: Tensor, mass: Tensor, max_iter: int, tol: float) -> Tensor:
    """The mean as a combination of the directions [N].

    cosine: between the directions [N, N]
    mass:   weights that sum to 1 [N]
    """

    def size(combination: Tensor) -> Tensor:
        return (combination @ cosine @ combination).clamp_min(0.0).sqrt()

    mean = mass / size(mass)
    if size(mass) < tol:
        mean = torch.zeros_like(mass)
        mean[mass.nonzero()[0]] = 1.0
    for _ in range(max_iter):
        towards = (cosine @ mean).clamp_(-1.0, 1.0)
        angle = towards.acos()
        pull = mass * torch.where(angle.sin() > NO_ARC, angle / angle.sin(), 1.0)
        step = pull - (pull @ towards) * mean
        turn = size(step)
        if turn < tol:
            break
        mean = turn.cos() * mean + turn.sin() / turn * step
        mean = mean / size(mean)
    return mean
