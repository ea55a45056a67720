import gc
import weakref

import torch

from quant.sweep import Scales, sweep
from wtool.grid import Grid


def test_nothing_is_held_afterwards():
    """The matrices go with the call, and not with the next collection of cycles: they are the most memory there is."""
    gc.collect()
    gc.disable()
    try:
        values, coupling = torch.rand(1, 300, 3), torch.rand(1, 300, 300)
        scales = Scales(torch.ones(1, 1, 3), None, torch.zeros(1, 300, dtype=torch.int64))
        held = weakref.ref(coupling)
        sweep(values, values.clone(), coupling, scales, Grid(4, -1, True))
        del coupling
        assert held() is None
    finally:
        gc.enable()
