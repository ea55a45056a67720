"""LoRA adapters: the sum that is read is the one PEFT makes, or the trained model's, where PEFT's is another."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

from wtool.checkpoint import open_checkpoint
from wtool.checkpoint.adapter import Adapted
from wtool.checkpoint.base import Checkpoint, TensorInfo
from wtool.errors import MalformedFile, Mismatch, MissingInput, QuantizedInput, WtoolError

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 60,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**SIZES),  # with biases
    "gpt2": lambda: GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=60),  # Conv1D, and tied
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def base(tmp_path: Path) -> Callable[[str], Path]:
    """Saves a tiny random model."""

    def save(family: str) -> Path:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[family]())
        for parameter in model.parameters():  # biases too, which are zeros at first
            torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return save


def trained(
    base: Path, config: Any, change: Callable[[Any], None] = lambda model: None, **save: Any
) -> tuple[Any, Path]:
    """A PEFT model with random weights wherever it would train, and the folder its adapter is saved in."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, on tied weights and on its own deprecations
        model = AutoModelForCausalLM.from_pretrained(base)
        change(model)
        model = get_peft_model(model, config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
        folder = base.parent / "adapter"
        model.save_pretrained(folder, **save)
    return model.eval(), folder


def opened(base: Path, adapter: Path) -> Checkpoint:
    return open_checkpoint(f"{base}+{adapter}")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(40)[None]).logits


def reopened(checkpoint: Checkpoint, folder: Path) -> Any:
    """The checkpoint as a folder that transformers opens."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(checkpoint.config))
    tensors = {name: checkpoint.read(name).clone().contiguous() for name in checkpoint.tensors}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model.eval()


def put(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a file anew; what was read of the old one may still be mapped."""
    path.unlink()
    save_file(tensors, path)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 12}),
    "linear": ("llama", {"target_modules": "all-linear"}),
    "regex": ("llama", {"target_modules": r".*layers\.1\..*(up|down)_proj"}),
    "rslora": ("llama", {"target_modules": ATTENTION, "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": ATTENTION,
            "rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.[kv]_proj": 3, "proj": 7},
            "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 5, "o_proj": 16},
        },
    ),
    "patterns-rslora": ("llama", {"target_modules": ATTENTION, "use_rslora": True, "rank_pattern": {"q_proj": 9}}),
    "head": ("llama", {"target_modules": ["lm_head"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "lora_alpha": 3}),
    "to-save": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]}),
    "bias-all": ("qwen2", {"target_modules": ["q_proj"], "bias": "all"}),
    "bias-lora-only": ("qwen2", {"target_modules": ["q_proj", "k_proj"], "bias": "lora_only"}),
    "lora-bias": ("qwen2", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True, "lora_alpha": 5}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt2-flag-forgotten": ("gpt2", {"target_modules": ["c_proj"]}),
    "gpt2-bias": ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}),
    "dora": ("llama", {"target_modules": "all-linear", "use_dora": True, "lora_alpha": 12}),
    "dora-rslora": ("qwen2", {"target_modules": ["k_proj"], "use_dora": True, "use_rslora": True}),
    "dora-gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "dora-embedding": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "gaussian": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}),
}


@pytest.mark.parametrize("name", CASES)
def test_reads_what_peft_merges(base: Callable[[str], Path], name: str) -> None:
    family, options = CASES[name]
    folder = base(family)
    model, adapter = trained(folder, LoraConfig(r=4, **options))
    checkpoint, plain = opened(folder, adapter), open_checkpoint(str(folder))
    merged = model.merge_and_unload().state_dict()
    assert list(checkpoint.tensors) == list(plain.tensors) and checkpoint.tensors == plain.tensors
    changed = 0
    for tensor in checkpoint.tensors:
        read = checkpoint.read(tensor)
        torch.testing.assert_close(read, merged[tensor], rtol=1e-5, atol=1e-6)
        changed += not torch.equal(read, plain.read(tensor))
    assert changed
    assert checkpoint.config == plain.config


def test_the_sum_by_its_definition(base: Callable[[str], Path]) -> None:
    folder = base("llama")
    _, adapter = trained(folder, LoraConfig(r=4, lora_alpha=12, target_modules=["down_proj"]))
    factors = load_file(adapter / "adapter_model.safetensors")
    stem = f"base_model.model.{DOWN.removesuffix('.weight')}"
    a, b = factors[f"{stem}.lora_A.weight"], factors[f"{stem}.lora_B.weight"]
    weight = load_file(folder / "model.safetensors")[DOWN]
    slow = weight.clone()
    for out in range(32):
        for inp in range(48):
            slow[out, inp] += 12 / 4 * sum(float(b[out, k]) * float(a[k, inp]) for k in range(4))
    torch.testing.assert_close(opened(folder, adapter).read(DOWN), slow)
    assert torch.equal(load_file(folder / "model.safetensors")[DOWN], weight)


def test_half_precision_is_summed_in_float32(base: Callable[[str], Path], tmp_path: Path) -> None:
    folder = base("llama")
    _, adapter = trained(folder, LoraConfig(r=4, target_modules=["down_proj"]))
    half = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    put(half, folder / "model.safetensors")
    checkpoint = opened(folder, adapter)
    factors = load_file(adapter / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.{DOWN.removesuffix('weight')}lora_{part}.weight"] for part in "AB")
    read = checkpoint.read(DOWN)
    assert checkpoint.tensors[DOWN] == TensorInfo("BF16", (32, 48)) and read.dtype == torch.float32
    torch.testing.assert_close(read, half[DOWN].float() + 2 * b @ a)
    assert checkpoint.read("model.norm.weight").dtype == torch.bfloat16


@pytest.mark.parametrize("form", ["default", "bin", "modules_to_save", "no trunk"])
def test_other_spellings_of_the_same(base: Callable[[str], Path], form: str) -> None:
    folder = base("gpt2" if form == "no trunk" else "llama")
    target = "c_attn" if form == "no trunk" else "q_proj"
    save = [] if form == "no trunk" else ["lm_head"]
    _, adapter = trained(folder, LoraConfig(r=4, target_modules=[target], modules_to_save=save))
    first = opened(folder, adapter)
    expected = {name: first.read(name) for name in first.tensors}
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    if form == "default":
        tensors = {
            name.replace(".weight", ".default.weight") if "lora_" in name else name: t for name, t in tensors.items()
        }
    if form == "modules_to_save":
        tensors = {name.replace("lm_head.", "lm_head.modules_to_save.default."): t for name, t in tensors.items()}
    if form == "bin":
        path.unlink()
        torch.save(tensors, adapter / "adapter_model.bin")
    else:
        put(tensors, path)
    if form == "no trunk":  # as openai-community/gpt2 is stored
        weights = load_file(folder / "model.safetensors")
        put({name.removeprefix("transformer."): t for name, t in weights.items()}, folder / "model.safetensors")
        expected = {name.removeprefix("transformer."): t for name, t in expected.items()}
    checkpoint = opened(folder, adapter)
    assert set(checkpoint.tensors) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.read(name), tensor)


def test_two_adapters_are_added_in_turn(base: Callable[[str], Path]) -> None:
    folder = base("llama")
    _, first = trained(folder, LoraConfig(r=4, target_modules=["down_proj"]))
    first = first.rename(first.with_name("first"))
    _, second = trained(folder, LoraConfig(r=2, target_modules=["down_proj", "q_proj"]))
    plain, one, two = (
        open_checkpoint(text).read(DOWN) for text in (f"{folder}", f"{folder}+{first}", f"{folder}+{second}")
    )
    both = open_checkpoint(f"{folder}+{first}+{second}")
    torch.testing.assert_close(both.read(DOWN), one + two - plain)
    assert both.label == f"{folder}+{first}+{second}"


# Tied output heads

TIED: dict[str, tuple[dict[str, Any], bool]] = {  # options, and whether the head stays tied
    "layers": ({"target_modules": ["q_proj"]}, True),
    "head": ({"target_modules": ["lm_head"]}, False),
    "embedding": ({"target_modules": ["embed_tokens"]}, False),
    "both": ({"target_modules": ["embed_tokens", "lm_head"]}, False),
    "saved-head": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
    "saved-embedding": ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, False),
    "saved-both": ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}, False),
    "saved-by-ending": ({"target_modules": ["q_proj"], "modules_to_save": ["tokens"]}, False),
    "dora-head": ({"target_modules": ["lm_head"], "use_dora": True}, False),
    "kept-embedding": ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "kept-saved": (
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        True,
    ),
}


@pytest.mark.parametrize("twice", [False, True], ids=["", "head-in-file"])
@pytest.mark.parametrize("name", TIED)
def test_a_tied_head_is_what_was_trained(base: Callable[[str], Path], tmp_path: Path, name: str, twice: bool) -> None:
    """Compared with the PEFT model itself: its merge changes the embedding and the head together."""
    options, stays_tied = TIED[name]
    folder = base("tied")
    model, adapter = trained(folder, LoraConfig(r=4, lora_alpha=12, **options))
    if twice:
        weights = load_file(folder / "model.safetensors")
        put({**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    checkpoint = opened(folder, adapter)
    assert checkpoint.config["tie_word_embeddings"] is stays_tied
    assert ("lm_head.weight" in checkpoint.tensors) is (not stays_tied or (twice and name == "layers"))
    torch.testing.assert_close(logits(reopened(checkpoint, tmp_path / "out")), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "tied"])
def test_new_tokens_resize_the_embedding(base: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    folder = base(family)

    def grow(model: Any) -> None:
        model.resize_token_embeddings(64, mean_resizing=False)

    config = LoraConfig(r=4, target_modules=["q_proj"])
    model, adapter = trained(folder, config, grow, save_embedding_layers=True)
    checkpoint = opened(folder, adapter)
    assert checkpoint.tensors["model.embed_tokens.weight"].shape == (64, 32)
    assert checkpoint.config["vocab_size"] == 64
    assert checkpoint.config["tie_word_embeddings"] is (family == "tied")
    torch.testing.assert_close(logits(reopened(checkpoint, tmp_path / "out")), logits(model), rtol=1e-4, atol=1e-4)


# The files beside the weights


def test_files_of_the_adapter_win(base: Callable[[str], Path]) -> None:
    folder = base("llama")
    _, adapter = trained(folder, LoraConfig(r=4, target_modules=["q_proj"]))
    for name in ("tokenizer.json", "chat_template.jinja", "README.md", "generation_config.json"):
        (folder / name).write_text("{}")
    (adapter / "train.py").write_text("")
    checkpoint = opened(folder, adapter)
    assert {path.parent for path in checkpoint.files.values()} == {folder}  # PEFT's README.md is the adapter's card
    assert "train.py" not in checkpoint.files
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (adapter / name).write_text("{}")
    files = opened(folder, adapter).files
    assert files["tokenizer.json"] == adapter / "tokenizer.json"
    assert "chat_template.jinja" not in files  # it was the other tokenizer's
    assert files["README.md"] == folder / "README.md"
    assert files["generation_config.json"] == folder / "generation_config.json"


def test_identity_holds_the_settings_too(base: Callable[[str], Path]) -> None:
    folder = base("llama")
    _, adapter = trained(folder, LoraConfig(r=4, target_modules=["q_proj"]))
    checkpoint = opened(folder, adapter)
    names = ["model.safetensors", "adapter_config.json", "adapter_model.safetensors"]
    assert [file.name for file in checkpoint.identity()] == names
    assert checkpoint.folders() == [folder.resolve(), adapter.resolve()]
    set_options(adapter, lora_alpha=99)
    assert opened(folder, adapter).identity()[1] != checkpoint.identity()[1].header
    name = "model.layers.0.self_attn.q_proj.weight"
    checkpoint.prefetch(name)
    before = checkpoint.read(name)
    checkpoint.forget(name)
    assert torch.equal(before, checkpoint.read(name))


# Errors


def set_options(adapter: Path, **options: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))


def rewrite(adapter: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = adapter / "adapter_model.safetensors"
    put(change(load_file(path)), path)


def refusal(base: Path, adapter: Path, error: type[WtoolError]) -> str:
    """The one line a pair is refused with."""
    with pytest.raises(error) as caught:
        opened(base, adapter)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def pair(base: Callable[[str], Path]) -> tuple[Path, Path]:
    folder = base("llama")
    return folder, trained(folder, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"]))[1]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("alora_invocation_tokens", [1, 2]),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", {"beta": 1e-4}),
        ("layer_replication", [[0, 1], [0, 2]]),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("trainable_token_indices", [3]),
        ("use_bdlora", {"nblocks": 2}),
        ("use_qalora", True),
        ("use_something_of_next_year", True),
    ],
)
def test_other_kinds_of_lora_are_refused_by_name(pair: tuple[Path, Path], option: str, value: Any) -> None:
    set_options(pair[1], **{option: value})
    assert f"LoRA with '{option}' is not read here: merge it with PEFT" in refusal(*pair, QuantizedInput)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga"])
def test_starts_that_change_the_base_are_refused(pair: tuple[Path, Path], start: str) -> None:
    set_options(pair[1], init_lora_weights=start)
    assert f"init_lora_weights '{start}' changes the base too" in refusal(*pair, QuantizedInput)


def test_pissa_would_be_wrong(base: Callable[[str], Path]) -> None:
    """Why such a start is refused: W + scale · B·A is not what PEFT merges then."""
    folder = base("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, adapter = trained(folder, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"))
        again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter)
        merged = again.merge_and_unload().state_dict()
    set_options(adapter, init_lora_weights=True)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.allclose(opened(folder, adapter).read(name), merged[name], atol=0.1)


def test_other_peft_types_are_refused_by_name(base: Callable[[str], Path]) -> None:
    folder = base("llama")
    _, adapter = trained(folder, IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    assert "peft_type IA3 is not read here, only LORA" in refusal(folder, adapter, QuantizedInput)


def test_what_matches_nothing_is_one_line(pair: tuple[Path, Path]) -> None:
    folder, adapter = pair
    rewrite(adapter, lambda tensors: {name.replace("layers.1.self", "layers.7.self"): t for name, t in tensors.items()})
    text = refusal(folder, adapter, Mismatch)
    assert (
        f"changes 'model.layers.7.self_attn.q_proj.weight', which {folder} does not hold; did you mean 'model." in text
    )
    assert f"(made for {folder})" in text


def test_shapes_that_do_not_fit_are_one_line(pair: tuple[Path, Path]) -> None:
    folder, adapter = pair
    good = load_file(adapter / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    module = "'model.layers.0.self_attn.q_proj'"
    for changes, error, text in [
        ({f"{stem}.lora_A.weight": torch.zeros(4, 9)}, Mismatch, f"{module} adds 32 x 9 to"),
        (
            {f"{stem}.lora_A.weight": torch.zeros(5, 32)},
            Mismatch,
            f"{module} has rank 5 and 4, adapter_config.json says 4",
        ),
        ({f"{stem}.lora_A.weight": torch.zeros(4, 32, 1)}, QuantizedInput, f"{module} is LoRA of a convolution"),
        ({"base_model.model.model.norm.weight": torch.zeros(9)}, Mismatch, "norm.weight' is [9], "),
        ({f"{stem}.lora_C.weight": torch.zeros(4)}, QuantizedInput, "is of a kind of LoRA that is not known here"),
        ({f"{stem}.lora_A.other.weight": torch.zeros(4, 32)}, MalformedFile, "are of two adapters"),
        ({f"{stem}.lora_magnitude_vector": torch.zeros(32)}, MalformedFile, "use_dora and the magnitudes disagree"),
    ]:
        rewrite(adapter, lambda _, changes=changes: {**good, **changes})
        assert text in refusal(folder, adapter, error)
    rewrite(
        adapter,
        lambda _: {name: t for name, t in good.items() if not name.endswith("0.self_attn.q_proj.lora_B.weight")},
    )
    assert "q_proj.lora_A.weight' lacks its lora_A or lora_B" in refusal(folder, adapter, MalformedFile)
    rewrite(adapter, lambda _: {})
    assert "adapter_model.safetensors: holds no tensor" in refusal(folder, adapter, MalformedFile)


def test_an_embedding_resized_without_its_head_is_one_line(pair: tuple[Path, Path]) -> None:
    folder, adapter = pair
    grown = {"base_model.model.model.embed_tokens.weight": torch.zeros(64, 32)}
    rewrite(adapter, lambda tensors: {**tensors, **grown})
    assert "its embedding has 64 tokens, the output head 60: save both" in refusal(folder, adapter, Mismatch)


def test_settings_that_are_none_are_one_line(pair: tuple[Path, Path]) -> None:
    folder, adapter = pair
    for option, value in {"r": 0, "lora_alpha": None}.items():
        set_options(adapter, **{option: value})
        assert f"'{option}' is {value!r}, not a number above 0" in refusal(folder, adapter, MalformedFile)
        set_options(adapter, r=4, lora_alpha=8)
    set_options(adapter, alpha_pattern={"q_proj": "8"})
    assert "'alpha_pattern: q_proj' is '8', not a number above 0" in refusal(folder, adapter, MalformedFile)
    (adapter / "adapter_config.json").write_text("[]")
    assert "holds a JSON list, not an object" in refusal(folder, adapter, MalformedFile)


def test_missing_files_are_one_line(pair: tuple[Path, Path]) -> None:
    folder, adapter = pair
    (adapter / "adapter_model.safetensors").unlink()
    assert "but neither adapter_model.safetensors nor adapter_model.bin" in refusal(folder, adapter, MissingInput)
    (adapter / "adapter_config.json").unlink()
    text = f"{adapter}: not a LoRA adapter: there is no adapter_config.json"
    assert refusal(folder, adapter, MissingInput) == text


def test_a_packed_base_is_one_line(pair: tuple[Path, Path]) -> None:
    folder, adapter = pair
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    put({**weights, name: weights[name].to(torch.float8_e4m3fn)}, folder / "model.safetensors")
    assert f"'{name}' is packed (F8_E4M3): give the unquantized base" in refusal(folder, adapter, QuantizedInput)


def test_an_unknown_name_is_missing(pair: tuple[Path, Path]) -> None:
    checkpoint = opened(*pair)
    assert isinstance(checkpoint, Adapted)
    with pytest.raises(MissingInput, match=r"no tensor 'model.norm.wait'; did you mean 'model.norm.weight'"):
        checkpoint.read("model.norm.wait")
