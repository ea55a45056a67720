"""The kernel beside the columns one by one: on a GPU if there is one, else in Triton's interpreter.

The interpreter has to be asked for before anything imports triton, so these tests have a process of their own then.
"""

import os
import subprocess
import sys

import pytest
import torch

from quant import sweep
from wtool.grid import Grid, fit

pytest.importorskip("triton", reason="no triton here: the sweep without it is tested in test_gptq.py")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CAN_RUN = DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
runs = pytest.mark.skipif(not CAN_RUN, reason="no GPU here: test_in_the_interpreter runs it")

if CAN_RUN:
    from quant.kernels.gptq_block import round_block


@pytest.mark.skipif(CAN_RUN, reason="the others run here")
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", __file__]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def block(n, columns, rows, grid, seed=0):
    """What round_columns takes, for weights whose columns have scales of their own."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, columns, rows, generator=generator)
    values = weight + 0.1 * torch.randn(n, columns, rows, generator=generator)
    coupling = torch.randn(n, columns, columns, generator=generator) / columns**0.5
    scales, zeros = fit(weight.reshape(-1, 1), grid, dtype=torch.float32)
    scales = scales.reshape(weight.shape) * (2 * torch.rand(n, columns, 1, generator=generator) + 0.5)
    return values, weight, coupling, scales, None if zeros is None else zeros.reshape(weight.shape).float()


@runs
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 16, 5), (2, 7, 17), (2, 40, 20)])
def test_as_column_by_column(shape, symmetric):
    grid = Grid(4, -1, symmetric)
    values, base, coupling, scales, zeros = block(*shape, grid)
    ours = [t.to(DEVICE).clone() for t in (values, base)]
    on_device = [None if t is None else t.to(DEVICE) for t in (coupling, scales, zeros)]
    if zeros is not None:
        ours[1].addcmul_(on_device[2], on_device[1])
    sweep.round_columns(values, base, coupling, scales, zeros, grid)
    round_block(*ours, *on_device, grid.lowest, grid.highest)
    same = (ours[0].cpu() == values).all(dim=1)  # rows where no sum in another order crossed a tie
    assert same.float().mean() > 0.9
    torch.testing.assert_close(ours[1].cpu().mT[same], base.mT[same], rtol=1e-4, atol=1e-4)


@runs
def test_the_last_rows_and_columns_of_a_larger_matrix():
    # a block is a view into a stack; nothing beside it is touched
    grid = Grid(3, -1)
    values, base, coupling, scales, _ = block(2, 40, 21, grid)
    whole = [t.to(DEVICE).clone() for t in (values, base)]
    part = slice(9, 30)
    round_block(
        whole[0][:, part],
        whole[1][:, part],
        coupling[:, part, part].to(DEVICE),
        scales[:, part].to(DEVICE),
        None,
        -4,
        3,
    )
    for after, before in zip(whole, (values, base), strict=True):
        untouched = torch.ones(40, dtype=torch.bool)
        untouched[part] = False
        assert torch.equal(after.cpu()[:, untouched], before[:, untouched])
        assert not torch.equal(after.cpu()[:, part], before[:, part])


@runs
def test_halves_go_to_the_even_code():
    values = torch.tensor([-8.5, -7.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 6.5, 7.5, 100.0, -100.0], device=DEVICE)
    values = values[None, None].clone()
    scales = torch.ones_like(values)
    round_block(values, torch.zeros_like(values), torch.zeros(1, 1, 1, device=DEVICE), scales, None, -8, 7)
    assert values[0, 0].tolist() == [-8, -8, -2, -2, 0, 0, 2, 2, 6, 7, 7, -8]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize("zeros", [True, False])
def test_it_compiles_for_a_gpu_that_is_not_here(zeros):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from quant.kernels import gptq_block

    names = gptq_block._round_block.arg_names
    kinds = dict.fromkeys(names, "i32") | dict.fromkeys(("lowest", "highest"), "fp32")
    kinds |= dict.fromkeys(("values", "base", "coupling", "scales", "zeros"), "*fp32")
    constants = {"COLUMNS": 128, "ROWS": gptq_block.ROWS, "ZEROS": zeros}
    source = ASTSource(gptq_block._round_block, kinds | dict.fromkeys(constants, "constexpr"), constants)
    options = {"num_warps": 4, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert "div.rn.f32" in compiled.asm["ptx"]  # rounded as on the processor, not to a few bits less
    assert compiled.asm["cubin"]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU here")
def test_gptq_on_the_gpu_is_as_on_the_processor():
    from quant.gptq import gptq

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(300, 512, generator=generator)
    inputs = torch.randn(2000, 512, generator=generator) @ torch.randn(512, 512, generator=generator)
    gram = inputs.T @ inputs / len(inputs)
    here = gptq(weight, gram, Grid(4, 128), scale_dtype=torch.float16).quantized
    there = gptq(weight.cuda(), gram.cuda(), Grid(4, 128), scale_dtype=torch.float16).quantized
    assert (here.codes != there.codes.cpu()).float().mean() < 0.02
