"""A cut checkpoint opens with plain transformers and computes what the full model with masks does."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES as MODELS
from families import family, saved_family
from masked_models import masked
from safetensors.torch import load_file, save_file
from tiny_models import llama, saved
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from prune.cut import cut
from prune.structure import FAMILIES, Kept, Shape, shape_of
from wtool.checkpoint.folder import open_local
from wtool.errors import Mismatch, MissingInput, QuantizedInput, UsageError
from wtool.executors.local import run
from wtool.loading import quiet
from wtool.plan import Plan
from wtool.shards import json_bytes

SIZES: dict[str, Any] = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}
OWN: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 4, "n_head": 8, "num_hidden_layers": 4, "num_attention_heads": 8},
    "bert": {"num_hidden_layers": 4, "num_attention_heads": 8},
    "gemma3_text": SIZES | {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "qwen3_moe": SIZES | {"decoder_sparse_step": 2, "mlp_only_layers": [3]},  # layer 1 has experts, the others none
    "qwen2": SIZES | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
}
TEXT = [name for name in FAMILIES if name in MODELS]
LOADERS = {"bert": transformers.BertForMaskedLM, "gemma3": transformers.Gemma3ForConditionalGeneration}
WHOLE = ("gpt2", "bert")  # heads and hidden go together only
MIXED = ("mixtral", "qwen3_moe")
CASES = [
    (name, parts)
    for name in TEXT
    for parts in ("depth", "ffn", "heads", "kv", "hidden", "experts", "expert_ffn", "heads+hidden", "all")
    if not (name in WHOLE and parts in ("heads", "kv", "hidden"))
    and not (name not in MIXED and parts in ("experts", "expert_ffn"))
    and not (name == "mixtral" and parts == "ffn")
]


def made(name: str) -> PreTrainedModel:
    """A random model of four layers, its norms and biases too."""
    model = family(name, **OWN.get(name, SIZES))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[PreTrainedModel, Path]]:
    result = {}
    for name in TEXT:
        model = made(name)
        result[name] = model, saved(model, tmp_path_factory.mktemp(name) / name, with_tokenizer=False)
    return result


def some(rng: random.Random, size: int | None, count: int) -> tuple[int, ...]:
    return tuple(sorted(rng.sample(range(size or 0), count)))


def chosen(shape: Shape, parts: str, whole: bool) -> Kept:
    """Something else to keep in every layer: half of the experts and heads, three quarters of the channels.

    whole: the family needs hidden to be heads × head_dim
    """
    rng = random.Random(7)
    asked = {"ffn", "experts", "expert_ffn", "heads", "kv", "hidden"} if parts == "all" else {*parts.split("+")}
    layers = (0, 1, 3) if asked & {"depth"} or parts == "all" else tuple(range(shape.layers))
    group = shape.heads // shape.kv_heads
    kv, heads, experts = {}, {}, {}
    for layer in layers:
        kv[layer] = some(rng, shape.kv_heads, shape.kv_heads // 2 if "kv" in asked else shape.kv_heads)
        heads[layer] = tuple(number * group + rng.randrange(group) for number in kv[layer])
        if whole:
            kv[layer] = heads[layer] = some(rng, shape.heads, 6)
        experts[layer] = some(rng, shape.experts, shape.experts // 2) if shape.experts else ()
    sparse = [layer for layer in layers if layer not in shape.dense]
    return Kept(
        layers=layers,
        hidden=some(rng, shape.hidden, 24) if "hidden" in asked else None,
        ffn={layer: some(rng, shape.ffn, 36) for layer in shape.dense & {*layers}} if "ffn" in asked else {},
        heads=heads if "heads" in asked else {},
        kv_heads=kv if "kv" in asked else {},
        experts={layer: experts[layer] for layer in sparse} if "experts" in asked else {},
        expert_ffn={
            (layer, expert): some(rng, shape.expert_ffn, 20) for layer in sparse for expert in range(shape.experts or 0)
        }
        if "expert_ffn" in asked
        else {},
    )


def cut_to(folder: Path, kept: Kept, out: Path, **options: Any) -> dict[str, Any]:
    """Cut a saved model and write the result; return its configuration."""
    source = open_local(folder, "full")
    steps, config = cut(source, kept, **options)
    run(Plan((source,), tuple(steps), {"config.json": json_bytes(config)}, {}), out)
    return config


def opened(out: Path, name: str = "", **options: Any) -> PreTrainedModel:
    """The model as transformers opens it, once it is clear that every tensor found its place."""
    loader: Any = LOADERS.get(name, AutoModelForCausalLM)
    with quiet():
        model, info = loader.from_pretrained(out, output_loading_info=True, **options)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


TOKENS = torch.arange(3, 300, 25)[None].repeat(2, 1) + torch.tensor([[0], [7]])  # [2, 12]


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: Tensor = TOKENS) -> Tensor:
    model.set_attn_implementation("eager")
    return model(input_ids=tokens, **({} if model.config.model_type == "bert" else {"use_cache": False})).logits


@pytest.mark.parametrize(("name", "parts"), CASES)
def test_a_cut_model_computes_what_the_masked_one_does(
    name: str, parts: str, models: dict[str, tuple[PreTrainedModel, Path]], tmp_path: Path
) -> None:
    model, folder = models[name]
    shape = shape_of(json.loads((folder / "config.json").read_text()))
    kept = chosen(shape, parts, name in WHOLE)
    config = cut_to(folder, kept, tmp_path / "cut")
    small = opened(tmp_path / "cut", name)

    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    expected, full, found = logits(masked(model, kept, shape)), logits(model), logits(small)
    assert (found - expected).norm() < 1e-4 * expected.norm()
    assert (full - expected).norm() > 1e-2 * expected.norm()  # the mask matters
    assert len(config.get("layer_types") or kept.layers) == len(kept.layers)
    if name != "bert":
        sampled = [
            small.generate(TOKENS[:, :5], max_new_tokens=3, do_sample=False, use_cache=cache, eos_token_id=None)
            for cache in (True, False)
        ]
        assert torch.equal(*sampled)


def test_what_is_left_of_each_tensor_by_its_definition(tmp_path: Path) -> None:
    full = llama(num_hidden_layers=2, attention_bias=True)
    full.to(torch.bfloat16)
    folder = saved(full, tmp_path / "full", with_tokenizer=False)
    hidden, heads = (0, 5, 6, 31), (1, 3)
    kept = Kept(layers=(1, 0), hidden=hidden, ffn={0: (2, 40), 1: (7, 8)}, heads={0: heads, 1: (0, 2)})
    cut_to(folder, kept, tmp_path / "cut")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "cut" / "model.safetensors")
    q, k = before["model.layers.0.self_attn.q_proj.weight"], before["model.layers.0.self_attn.k_proj.weight"]
    expected = torch.zeros(16, 4, dtype=torch.bfloat16)
    for row, (head, channel) in enumerate((head, channel) for head in heads for channel in range(8)):
        for column, number in enumerate(hidden):
            expected[row, column] = q[head * 8 + channel, number]
    assert torch.equal(after["model.layers.1.self_attn.q_proj.weight"], expected)
    assert torch.equal(after["model.layers.1.self_attn.k_proj.weight"], k[:, list(hidden)])
    up = before["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(after["model.layers.0.mlp.up_proj.weight"], up[[7, 8]][:, list(hidden)])
    bias = before["model.layers.0.self_attn.q_proj.bias"].view(4, 8)
    assert torch.equal(after["model.layers.1.self_attn.q_proj.bias"], bias[[1, 3]].flatten())


def test_a_layer_twice_and_one_of_everything(tmp_path: Path) -> None:
    folder = saved(llama(num_hidden_layers=3), tmp_path / "full", with_tokenizer=False)
    one = {0: (1,), 2: (3,)}
    kept = Kept(layers=(2, 0, 2), hidden=(4,), ffn={0: (47,), 2: (0,)}, heads=one, kv_heads={0: (0,), 2: (1,)})
    cut_to(folder, kept, tmp_path / "cut")
    small = opened(tmp_path / "cut")
    assert (small.config.num_hidden_layers, small.config.num_attention_heads, small.config.hidden_size) == (3, 1, 1)
    state = small.state_dict()
    assert torch.equal(state["model.layers.0.mlp.down_proj.weight"], state["model.layers.2.mlp.down_proj.weight"])
    assert logits(small).isfinite().all()


@pytest.mark.parametrize("tied", [True, False])
def test_gemma_scales_by_the_root_of_its_width(tied: bool, tmp_path: Path) -> None:
    model = family("gemma3_text", tie_word_embeddings=tied)
    folder = saved(model, tmp_path / "full", with_tokenizer=False)
    kept = Kept(layers=(0, 1), hidden=tuple(range(4, 32)))
    cut_to(folder, kept, tmp_path / "cut")
    expected = logits(masked(model, kept, shape_of(json.loads((folder / "config.json").read_text()))))
    assert (logits(opened(tmp_path / "cut")) - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_norms_are_scaled_by_what_was_measured(name: str, tmp_path: Path) -> None:
    folder = saved(made(name), tmp_path / "full", with_tokenizer=False)
    norm = "model.layers.3.post_attention_layernorm.weight"
    cut_to(folder, Kept(layers=(3,)), tmp_path / "cut", scale={norm: 0.5})
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "cut"))
    one = 1 if name == "gemma3_text" else 0  # Gemma multiplies by the weight plus one
    found = after["model.layers.0.post_attention_layernorm.weight"]
    assert torch.allclose(found + one, 0.5 * (before[norm] + one))
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"])
    with pytest.raises(MissingInput, match=r"no tensor 'model\.nrm\.weight'; did you mean 'model\.norm\.weight'\?"):
        cut(open_local(folder, "full"), Kept(layers=(3,)), scale={"model.nrm.weight": 0.5})


def test_the_language_model_inside_a_model_that_sees(tmp_path: Path) -> None:
    text = family("gemma3_text", **OWN["gemma3_text"]).config
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14, "model_type": "siglip_vision_model"}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=5
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    folder = saved(model, tmp_path / "full", with_tokenizer=False)
    shape = shape_of(json.loads((folder / "config.json").read_text()))
    kept = chosen(shape, "all", False)
    cut_to(folder, kept, tmp_path / "cut")
    small = opened(tmp_path / "cut", "gemma3")

    tower = "model.vision_tower.embeddings.patch_embedding.weight"
    assert torch.equal(small.state_dict()[tower], model.state_dict()[tower])
    seen: dict[str, Any] = {"pixel_values": torch.rand(1, 3, 28, 28), "use_cache": False}
    seen["input_ids"] = torch.tensor([[9, 5, 5, 5, 5, 8, 30]])
    with torch.no_grad():
        expected, found = masked(model, kept, shape)(**seen).logits, small(**seen).logits
    assert (found - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("name", ["opt", "deepseek_v3"])
def test_a_family_that_is_not_in_the_table_loses_layers_only(name: str, tmp_path: Path) -> None:
    saved_family(name, tmp_path / "full", num_hidden_layers=3)
    cut_to(tmp_path / "full", Kept(layers=(0, 2)), tmp_path / "cut")
    assert opened(tmp_path / "cut").config.num_hidden_layers == 2
    with pytest.raises(UsageError, match=f"only whole layers can be taken out of a '{name}'; .* of: llama, mistral,"):
        cut(open_local(tmp_path / "full", "full"), Kept(layers=(0, 2), hidden=(0, 1)))


def test_tensors_that_are_not_what_the_configuration_says(tmp_path: Path) -> None:
    saved(llama(), tmp_path, with_tokenizer=False)
    path, kept = tmp_path / "model.safetensors", Kept(layers=(0, 1), ffn={0: (0,), 1: (1,)})
    whole = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"

    def refusal(**changed: Tensor) -> pytest.ExceptionInfo[Exception]:
        save_file(whole | changed, path, {"format": "pt"})
        with pytest.raises((Mismatch, QuantizedInput)) as caught:
            cut(open_local(tmp_path, "full"), kept)
        return caught

    assert f"full: tensor '{name}' is [40, 32], by config.json it would be 48 x 32" in str(
        refusal(**{name: torch.zeros(40, 32)}).value
    )
    assert "is packed (I8)" in str(refusal(**{name: torch.zeros(48, 32, dtype=torch.int8)}).value)
    unknown = refusal(**{"model.layers.0.mlp.extra.weight": torch.zeros(3)})
    assert "tensor 'model.layers.0.mlp.extra.weight' is not in the table of its family" in str(unknown.value)
