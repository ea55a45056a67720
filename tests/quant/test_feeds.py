"""What feeds what, in the last block of tiny models of many families."""

from pathlib import Path

import pytest
import torch
from families import saved_family

from quant.chains import chains
from quant.feeds import Feed, feeds
from quant.scaled import Looking
from wtool import calibrate
from wtool.block_pass import Forward
from wtool.checkpoint import open_checkpoint
from wtool.network import Network

PRE, POST, QKV = "input_layernorm.weight", "post_attention_layernorm.weight", ("q_proj", "k_proj", "v_proj")
ATTENTION = {PRE: {f"self_attn.{name}.weight" for name in QKV}, "self_attn.v_proj.weight": {"self_attn.o_proj.weight"}}
MLP = {
    POST: {"mlp.gate_proj.weight", "mlp.up_proj.weight"},
    "mlp.up_proj.weight": {"mlp.down_proj.weight"},
}
EXPERTS = {POST: {"mlp.gate.weight", "mlp.experts.gate_up_proj"}, "mlp.experts.gate_up_proj": {"mlp.experts.down_proj"}}
EXPECTED = {
    "llama": ATTENTION | MLP,
    "qwen2": ATTENTION | MLP,
    "qwen3": ATTENTION | MLP,
    "mixtral": ATTENTION | EXPERTS,
    "qwen3_moe": ATTENTION | EXPERTS,
    "gemma3_text": ATTENTION
    | {"pre_feedforward_layernorm.weight": MLP[POST], "mlp.up_proj.weight": {"mlp.down_proj.weight"}},
    "phi3": {
        PRE: {"self_attn.qkv_proj.weight"},
        "self_attn.qkv_proj.weight": {"self_attn.o_proj.weight"},
        POST: {"mlp.gate_up_proj.weight"},
        "mlp.gate_up_proj.weight": {"mlp.down_proj.weight"},
    },
    "gpt2": {  # GELU stands between c_fc and c_proj
        "ln_1.weight": {"attn.c_attn.weight"},
        "attn.c_attn.weight": {"attn.c_proj.weight"},
        "ln_2.weight": {"mlp.c_fc.weight"},
    },
    "opt": {  # ReLU passes a positive factor on
        "self_attn_layer_norm.weight": {f"self_attn.{name}.weight" for name in QKV},
        "self_attn.v_proj.weight": {"self_attn.out_proj.weight"},
        "final_layer_norm.weight": {"fc1.weight"},
        "fc1.weight": {"fc2.weight"},
    },
    "olmo2": {  # its norms stand behind, before the residual stream
        "self_attn.v_proj.weight": {"self_attn.o_proj.weight"},
        "mlp.up_proj.weight": {"mlp.down_proj.weight"},
    },
}


def found_in(name: str, folder: Path, dtype: str = "F32") -> tuple[list[Feed], Forward]:
    saved_family(name, folder / "model")
    network = Network(open_checkpoint(str(folder / "model")), dtype=dtype)
    ids = torch.randint(3, 300, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), calibrate.hidden_states("device", network.device) as hidden:
        calls = calibrate.first_inputs(network, [ids], hidden)
        block = network.blocks[-1]
        forward = Forward(network, block, [calls[0][block.index]], hidden, Looking(()), lambda done: None)
        with network.filled(block):
            return feeds(forward), forward


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("name", EXPECTED)
def test_every_family(name: str, dtype: str, tmp_path: Path) -> None:
    found, _ = found_in(name, tmp_path, dtype)
    assert {feed.parameter: set(feed.takers) for feed in found} == EXPECTED[name]
    gemma = {feed.parameter for feed in found if feed.kind == "norm of 1 + weight"}
    assert gemma == ({PRE, "pre_feedforward_layernorm.weight"} if name == "gemma3_text" else set())


def test_a_value_is_found_in_every_query_head_that_reads_it(tmp_path: Path) -> None:
    """4 query heads of 8 features, 2 value heads."""
    found, _ = found_in("llama", tmp_path)
    (feed,) = (feed for feed in found if feed.parameter == "self_attn.v_proj.weight")
    channel = feed.takers["self_attn.o_proj.weight"]
    assert channel is not None
    assert channel.tolist() == [head // 2 * 8 + i for head in range(4) for i in range(8)]


def test_fused_matrices_are_divided_where_the_values_are(tmp_path: Path) -> None:
    found, _ = found_in("phi3", tmp_path)
    begins = {feed.parameter: (feed.begin, feed.channels) for feed in found if feed.kind == "rows"}
    assert begins == {"self_attn.qkv_proj.weight": (48, 16), "mlp.gate_up_proj.weight": (48, 48)}


def test_experts_have_chains_of_their_own_and_names_on_disk(tmp_path: Path) -> None:
    found, forward = found_in("mixtral", tmp_path)
    all_chains = [chain for feed in found for chain in chains(forward.block, feed)]
    moe = "model.layers.1.block_sparse_moe"
    norm = next(chain for chain in all_chains if chain.norm == f"model.layers.1.{POST}")
    expected = {f"{moe}.gate.weight"} | {f"{moe}.experts.{i}.{w}.weight" for i in range(4) for w in ("w1", "w3")}
    assert {taker.tensor for taker in norm.takers} == expected
    for i in range(4):
        own = next(chain for chain in all_chains if chain.source == f"{moe}.experts.{i}.w3.weight")
        assert [taker.tensor for taker in own.takers] == [f"{moe}.experts.{i}.w2.weight"]
        assert [(part.begin, part.first, part.count) for part in own.rows] == [(0, 0, 48)]
