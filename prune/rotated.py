"""A model with its residual stream turned, as pruning reads it: by directions, and of families whose axes are known."""

from torch import Tensor

from wtool import rotated
from wtool.checkpoint.base import Checkpoint
from wtool.rotated import TURNING as TURNING
from wtool.rotation import Dense

from .cut import check_extents
from .families import family_of
from .structure import shape_of


class Rotated(rotated.Rotated):
    """A view of a checkpoint as the same model with another basis of its residual stream.

    directions: as `principal_directions` gives them; None where only headers are needed
    raises: UsageError for a family that cannot be turned, Mismatch if tensors and config.json disagree, QuantizedInput
    """

    def __init__(self, source: Checkpoint, directions: Tensor | None):
        family = family_of(source.config)
        super().__init__(source, None if directions is None else Dense(directions))
        shape = shape_of(source.config)
        for name in source.tensors:
            check_extents(source, family, name, shape)
