"""Which norms read what a block puts out, and by how much they multiply its features."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import family
from tiny_models import SIZES, saved
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel

from wtool import calibrate
from wtool.block_pass import Forward, HiddenStates
from wtool.checkpoint import open_checkpoint
from wtool.errors import MissingInput
from wtool.stream_norms import gains, gains_after

TOKENS = torch.arange(3, 15)


def with_random_norms(model: PreTrainedModel) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.normal_(0.5, 1, generator=generator)
    return model


def found(folder: Path) -> list[Tensor | None]:
    """The gains after each block of a saved model."""
    network = calibrate.network(open_checkpoint(str(folder)), calibrate.Where(dtype="F32"))
    hidden, gathered = HiddenStates(torch.device("cpu"), None), []
    visitor: Any = None  # nothing is visited
    with torch.no_grad():
        calls = calibrate.first_inputs(network, [TOKENS[None]], hidden)
        for block in network.blocks:
            with network.filled(block):
                forward = Forward(network, block, [calls[0][block.index]], hidden, visitor, lambda done: None)
                gathered.append(gains_after(forward, TOKENS))
            assert all(parameter.is_meta for parameter in network.model.parameters())
    return gathered


@pytest.mark.parametrize(
    ("name", "norm", "last", "one"),
    [
        ("llama", "model.layers.1.input_layernorm", "model.norm", 0),
        ("qwen3_moe", "model.layers.1.input_layernorm", "model.norm", 0),
        ("phi3", "model.layers.1.input_layernorm", "model.norm", 0),
        ("deepseek_v3", "model.layers.1.input_layernorm", "model.norm", 0),
        ("gemma3_text", "model.layers.1.input_layernorm", "model.norm", 1),
        ("gpt2", "transformer.h.1.ln_1", "transformer.ln_f", 0),
        ("olmo2", None, "model.norm", 0),
    ],
)
def test_gains_are_the_weights_of_the_norm_that_reads_a_block(
    name: str, norm: str | None, last: str, one: int, tmp_path: Path
) -> None:
    model = with_random_norms(family(name))
    saved(model, tmp_path / "model")
    after, end = found(tmp_path / "model")
    if norm is None:
        assert after is None
    else:
        assert after is not None
        torch.testing.assert_close(after, (model.get_parameter(f"{norm}.weight") + one).abs(), rtol=1e-4, atol=1e-4)
    assert end is not None
    torch.testing.assert_close(end, (model.get_parameter(f"{last}.weight") + one).abs(), rtol=1e-4, atol=1e-4)


def test_norms_beside_each_other_both_count(tmp_path: Path) -> None:
    config = GPTNeoXConfig(**{**SIZES, "intermediate_size": 48, "use_parallel_residual": True})
    model = with_random_norms(GPTNeoXForCausalLM(config))
    saved(model, tmp_path / "model")
    both = [
        model.get_parameter(f"gpt_neox.layers.1.{name}.weight").data
        for name in ("input_layernorm", "post_attention_layernorm")
    ]
    after = found(tmp_path / "model")[0]
    assert after is not None
    torch.testing.assert_close(after, torch.stack(both).square().mean(0).sqrt(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("features", [1, 2, 7, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gains_of_torchs_own_norms(features: int, dtype: torch.dtype) -> None:
    weight = torch.randn(features, generator=torch.Generator().manual_seed(features)).to(dtype)
    norm = nn.RMSNorm(features, dtype=dtype)
    norm.weight.data.copy_(weight)
    torch.testing.assert_close(gains(norm), weight.float(), rtol=1e-2, atol=1e-4)
    if features % 2 == 0:
        norm = nn.LayerNorm(features, dtype=dtype)
        norm.weight.data.copy_(weight)
        norm.bias.data.fill_(0.25)
        torch.testing.assert_close(gains(norm), weight.float(), rtol=1e-2, atol=5e-3)


def test_a_last_norm_that_the_checkpoint_lacks_is_told(tmp_path: Path) -> None:
    model = family("llama")
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "model.norm.weight"}
    model.save_pretrained(tmp_path / "model", state_dict=state)
    with pytest.raises(MissingInput, match=r"lacks the weights of 'model\.norm\.weight'"):
        found(tmp_path / "model")
