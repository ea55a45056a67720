"""GGUF files of tiny models: our reader and transformers read back what went in, under the types llama.cpp takes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import saved_family
from tiny_models import llama, saved, tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from quant.gguf_types import MIXTURES, type_of
from wtool.checkpoint import open_checkpoint
from wtool.checkpoint.gguf import GGUFFile
from wtool.cli import run
from wtool.formats.gguf import TYPES
from wtool.gguf_tokenizer import WORDS, tokenizer_metadata
from wtool.loading import quiet
from wtool.writer import MANIFEST

GEMMA3 = {
    "num_hidden_layers": 7,
    "layer_types": [*["sliding_attention"] * 5, "full_attention", "sliding_attention"],
    "query_pre_attn_scalar": 8,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MODELS: dict[str, Callable[[Path], Any]] = {
    "llama": lambda folder: saved(llama(), folder),
    "llama-tied": lambda folder: saved(llama(tie_word_embeddings=True), folder),
    "llama-bias": lambda folder: saved(llama(attention_bias=True, mlp_bias=True), folder),
    "llama3-rope": lambda folder: saved(llama(rope_parameters=LLAMA3), folder),
    "mistral": lambda folder: saved_family("mistral", folder, sliding_window=None),
    "qwen2": lambda folder: saved_family("qwen2", folder),
    "qwen3": lambda folder: saved_family("qwen3", folder),
    "gemma3": lambda folder: saved_family("gemma3_text", folder, **GEMMA3),
}


def export(model: Path, out: Path, *options: str) -> GGUFFile:
    assert run(["quantize", str(model), "--format", "gguf", *options, "-o", str(out), "--quiet"]) == 0
    (file,) = out.glob("*.gguf")
    return GGUFFile(file)


def logits(folder: Path, file: str | None = None) -> torch.Tensor:
    with quiet(), torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
        return model(torch.arange(24)[None] * 7 % 320).logits


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back_whole(name: str, tmp_path: Path) -> None:
    MODELS[name](tmp_path / "model")
    file = export(tmp_path / "model", tmp_path / "out", "--type", "F32")
    before, after = (open_checkpoint(str(tmp_path / each)) for each in ("model", "out"))
    expected = {each for each in before.tensors if not (name == "llama-tied" and each == "lm_head.weight")}
    assert set(after.tensors) == expected
    for each in expected:
        rounding = 1e-6 if name == "gemma3" and "norm" in each else 0  # 1 + w rounds
        torch.testing.assert_close(after.read(each), before.read(each), rtol=0, atol=rounding)
    if name not in ("llama-bias", "llama3-rope", "qwen3", "gemma3"):  # of which transformers does not read everything
        ours = logits(tmp_path / "out", file.path.name)
        torch.testing.assert_close(ours, logits(tmp_path / "model"), rtol=1e-4, atol=1e-4)
    ours, theirs = (each.config for each in (after, before))
    for setting in (
        "num_hidden_layers",
        "num_key_value_heads",
        "rms_norm_eps",
        "vocab_size",
        "max_position_embeddings",
    ):
        assert ours[setting] == pytest.approx(theirs[setting], rel=1e-7), setting
    assert ours["bos_token_id"] == 0 and ours["eos_token_id"] == 1


def test_rotary_scaling_comes_back(tmp_path: Path) -> None:
    MODELS["llama3-rope"](tmp_path / "model")
    config = export(tmp_path / "model", tmp_path / "out", "--type", "F16").config
    assert config["rope_theta"] == 5e5
    assert config["rope_scaling"] == {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    scaled = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
    saved(llama(rope_parameters=scaled), tmp_path / "yarn")
    config = export(tmp_path / "yarn", tmp_path / "yarn-out", "--type", "F16").config
    assert config["rope_scaling"] == {key: value for key, value in scaled.items() if key != "rope_theta"}


def test_the_tokenizer_comes_back(tmp_path: Path) -> None:
    saved(llama(), tmp_path / "model", with_tokenizer=False)
    given = tokenizer()
    given.chat_template = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
    given.save_pretrained(tmp_path / "model")
    given.chat_template = None  # it is shared
    file = export(tmp_path / "model", tmp_path / "out", "--type", "F16")
    metadata = file.header.metadata
    assert metadata["tokenizer.ggml.pre"] == "gpt-2" and metadata["tokenizer.ggml.add_bos_token"] is True
    assert metadata["tokenizer.ggml.add_eos_token"] is False
    ours = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file=file.path.name)
    for text in ("for x in range(10): pass  # é", "</s> while", ""):
        found = ours(text, add_special_tokens=False)["input_ids"]
        assert found == given(text, add_special_tokens=False)["input_ids"]
    assert ours.chat_template.startswith("{% for m in messages %}")


def pieces(prefix: bool) -> PreTrainedTokenizerFast:
    """A tokenizer of SentencePiece's kind: spaces as low lines, unknown letters as bytes."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps: list[Any] = [normalizers.Prepend("▁")] if prefix else []
    bpe.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    bpe.train_from_iterator(["▁the▁they▁then▁there"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("prefix", [True, False])
def test_pieces_have_scores_in_the_order_of_merges(prefix: bool, tmp_path: Path) -> None:
    saved(llama(), tmp_path, with_tokenizer=False)
    pieces(prefix).save_pretrained(tmp_path)
    told = tokenizer_metadata(open_checkpoint(str(tmp_path)), 320)
    ggml = {key.removeprefix("tokenizer.ggml."): value for key, value in told.items()}
    assert ggml["model"] == "llama" and ggml["add_space_prefix"] is prefix and ggml["unknown_token_id"] == 0
    merges = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
    made = ["".join(pair if isinstance(pair, list) else pair.split(" ")) for pair in merges]
    scores = dict(zip(ggml["tokens"], ggml["scores"], strict=True))
    found = [scores[piece] for piece in dict.fromkeys(made)]
    assert len(found) > 5 and found == sorted(found, reverse=True)
    assert ggml["token_type"][:4] == [2, 3, 3, 6] or ggml["token_type"][:3] == [2, 3, 3]
    assert len(ggml["tokens"]) == 320 and ggml["tokens"][-1] == "[PAD319]" and ggml["token_type"][-1] == 5


@pytest.mark.parametrize("rule", [rule for rule in WORDS if len(rule) == 1 and rule != ("bytes",)])
def test_how_words_are_cut_is_told_by_name(rule: tuple[str], tmp_path: Path) -> None:
    saved(llama(), tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": rule[0]}, "behavior": "Isolated", "invert": False}
    letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, letters]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert tokenizer_metadata(open_checkpoint(str(tmp_path)), 320)["tokenizer.ggml.pre"] == WORDS[rule]


# Types


@pytest.mark.parametrize("kind", MIXTURES)
def test_every_type_is_written_and_read(kind: str, tmp_path: Path) -> None:
    saved(llama(hidden_size=256, intermediate_size=256, num_hidden_layers=1), tmp_path / "model")
    file = export(tmp_path / "model", tmp_path / "out", "--type", kind)
    assert file.path.name == f"model-{kind}.gguf" and file.header.metadata["general.file_type"] == MIXTURES[kind][1]
    name = "model.layers.0.mlp.up_proj.weight"
    before = open_checkpoint(str(tmp_path / "model")).read(name)
    most = {"Q2": 0.3, "Q3": 0.17, "Q4": 0.09, "Q5": 0.05, "Q6": 0.03, "Q8": 0.008, "BF": 0.004}.get(kind[:2], 1e-3)
    assert 0 <= float((file.read(name).float() - before).norm() / before.norm()) < most
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_bytes())
    if MIXTURES[kind][0] in TYPES:
        told = manifest["report"][name.removesuffix(".weight")]
        error = float((file.read(name) - before).norm() / before.norm())
        assert told["weight_error"] == pytest.approx(error, rel=1e-3) and "fallback" not in told
    assert set(path.name for path in (tmp_path / "out").iterdir()) == {file.path.name, MANIFEST, "README.md"}


def test_mixtures_are_those_of_llama_cpp() -> None:
    """What llama.cpp (llama-cpp-python 0.3.36) itself made of a llama of 16 blocks with 4 heads that share one."""
    config = {"num_hidden_layers": 16, "num_attention_heads": 4, "num_key_value_heads": 1, "model_type": "llama"}
    more = {0, 1, 4, 7, 10, 13, 14, 15}
    theirs = {
        ("Q4_K_M", "attn_v"): lambda block: "Q6_K" if block in more else "Q4_K",
        ("Q4_K_M", "ffn_down"): lambda block: "Q6_K" if block in more else "Q4_K",
        ("Q4_K_M", "attn_q"): lambda block: "Q4_K",
        ("Q4_K_S", "attn_v"): lambda block: "Q5_K" if block < 4 else "Q4_K",
        ("Q4_K_S", "ffn_down"): lambda block: "Q5_K" if block < 2 else "Q4_K",
        ("Q3_K_M", "attn_v"): lambda block: "Q5_K" if block < 2 else "Q4_K",
        ("Q3_K_M", "ffn_down"): lambda block: "Q5_K" if block < 1 else "Q4_K",
        ("Q3_K_M", "attn_output"): lambda block: "Q4_K",
        ("Q3_K_L", "ffn_down"): lambda block: "Q5_K",
        ("Q2_K", "attn_v"): lambda block: "Q4_K",
        ("Q2_K", "attn_output"): lambda block: "Q3_K",
        ("Q5_K_M", "ffn_down"): lambda block: "Q6_K" if block in more else "Q5_K",
        ("Q4_0", "ffn_down"): lambda block: "Q4_0",
    }
    for (mixture, matrix), expected in theirs.items():
        for block in range(16):
            found = type_of(f"blk.{block}.{matrix}.weight", (512, 512), mixture, config, tied=False)
            assert found.type == found.wanted == expected(block), (mixture, matrix, block)
    head = [
        type_of(name, (320, 256), "Q4_0", config, tied=False).type for name in ("output.weight", "token_embd.weight")
    ]
    assert head == ["Q6_K", "Q4_0"]
    assert type_of("token_embd.weight", (320, 256), "Q4_K_M", config, tied=True).type == "Q6_K"
    assert type_of("blk.0.attn_norm.weight", (256,), "Q4_K_M", config, tied=True).type == "F32"


def test_rows_that_do_not_divide_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(llama(), tmp_path / "model")  # rows of 32, and of 48, which nothing divides
    assert run(["quantize", str(tmp_path / "model"), "-f", "gguf", "--dry-run"]) == 0
    assert "matrices are Q5_0, not Q4_K: rows of 32 are no multiple of 256, which Q4_K needs" in capsys.readouterr().out
    file = export(tmp_path / "model", tmp_path / "out")
    kinds = {name: tensor.kind for name, tensor in file.header.tensors.items()}
    assert kinds["blk.0.attn_q.weight"] == TYPES["Q5_0"].number and kinds["blk.0.ffn_down.weight"] == 1  # F16
    assert kinds["output.weight"] == TYPES["Q8_0"].number
    report = json.loads((tmp_path / "out" / MANIFEST).read_bytes())["report"]
    assert report["model.layers.0.self_attn.q_proj"]["fallback"].startswith("rows of 32 are no multiple of 256")


def test_statistics_make_what_counts_nearer(model: Path, text: Path, tmp_path: Path) -> None:
    few = ["--calib", str(text), "--samples", "8", "--seqlen", "64", "--quiet"]
    assert run(["calibrate", str(model), *few, "-o", str(tmp_path / "stats")]) == 0
    with_them = export(model, tmp_path / "a", "-t", "Q4_0", "--stats", str(tmp_path / "stats"))
    without = export(model, tmp_path / "b", "-t", "Q4_0")
    source, name = open_checkpoint(str(model)), "model.layers.1.self_attn.q_proj.weight"
    count = open_statistics_diagonal(tmp_path / "stats", name)
    errors = [
        float(((file.read(name) - source.read(name).float()).square() * count).sum()) for file in (with_them, without)
    ]
    assert errors[0] < errors[1]
    embedding = "model.embed_tokens.weight"
    assert torch.equal(with_them.read(embedding), without.read(embedding))


def open_statistics_diagonal(folder: Path, name: str) -> torch.Tensor:
    from wtool.statistics_folder import open_statistics

    statistics = open_statistics(folder)
    return statistics.matrices.read(statistics.inputs[name].linears[0]).diagonal()


def test_the_same_command_again_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(llama(), tmp_path / "model")
    file = export(tmp_path / "model", tmp_path / "out", "-t", "Q8_0")
    before = file.path.read_bytes()
    assert run(["quantize", str(tmp_path / "model"), "-f", "gguf", "-t", "Q8_0", "-o", str(tmp_path / "out")]) == 0
    assert "there already" in capsys.readouterr().out
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(json.dumps({"model": str(tmp_path / "model"), "format": "gguf", "type": "Q8_0"}))
    assert run(["quantize", str(recipe), "-o", str(tmp_path / "again"), "--quiet"]) == 0
    assert (tmp_path / "again" / file.path.name).read_bytes() == before
    again = export(file.path, tmp_path / "twice", "-t", "Q8_0")  # a GGUF of a GGUF
    name = "model.layers.0.self_attn.k_proj.weight"
    torch.testing.assert_close(again.read(name), file.read(name), rtol=1e-3, atol=1e-4)


# Refused before any work


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(["quantize", *arguments, "--format", "gguf", "--dry-run"]) in (2, 3)
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    return text


def test_a_family_that_is_not_known_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved_family("gpt2", tmp_path)
    assert "no GGUF is made of the model type 'gpt2' here (known: llama, qwen2, qwen3" in refusal(capsys, str(tmp_path))


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"query_pre_attn_scalar": 5}, "query_pre_attn_scalar is 5; llama.cpp computes this gemma3 with 8"),
        ({"layer_types": ["full_attention"] * 7}, "llama.cpp takes it that every 6th layer attends to everything"),
        (
            {"hidden_activation": "relu"},
            "its activation is 'relu'; llama.cpp computes a gemma3 with 'gelu_pytorch_tanh'",
        ),
    ],
)
def test_what_a_file_cannot_tell_is_refused(
    settings: dict[str, Any], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved_family("gemma3_text", tmp_path, **GEMMA3 | settings)
    assert told in refusal(capsys, str(tmp_path))


def test_tokenizers_that_llama_cpp_does_not_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(llama(), tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["pre_tokenizer"] = {"type": "Whitespace"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert "how its tokenizer cuts words: Whitespace (known: gpt-2, smollm" in refusal(capsys, str(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    assert "no tokenizer beside the weights" in refusal(capsys, str(tmp_path))


def test_options_that_do_not_go_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(llama(), tmp_path)
    assert "'bits' does not go with the format gguf: its type says all" in refusal(capsys, str(tmp_path), "-b", "4")
    assert "gather statistics with `wtool calibrate`" in refusal(capsys, str(tmp_path), "--samples", "4")
    assert "no GGUF type 'Q4_K_X'; did you mean 'Q4_K_" in refusal(capsys, str(tmp_path), "-t", "Q4_K_X")
    assert run(["quantize", str(tmp_path), "-t", "Q4_K_M", "--dry-run"]) == 2
    assert "type Q4_K_M is for the format gguf, not for compressed-tensors" in capsys.readouterr().err


def test_values_that_are_not_finite_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = llama()
    with torch.no_grad():
        broken.get_parameter("model.layers.0.mlp.up_proj.weight")[3, 4] = torch.nan
    saved(broken, tmp_path / "model")
    assert run(["quantize", str(tmp_path / "model"), "-f", "gguf", "-o", str(tmp_path / "out"), "-q"]) == 5
    assert "'model.layers.0.mlp.up_proj.weight' has nan at element 100" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
