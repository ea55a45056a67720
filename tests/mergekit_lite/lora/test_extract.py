"""`wtool extract-lora`: PEFT on the base with what was extracted is the tuned model, as far as the ranks allow."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_adapters import adapter, deltas, in_peft, logits, peft_quiet, settings
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import llama, saved
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from mergekit_lite.lora import svd
from wtool.checkpoint import open_checkpoint
from wtool.cli import run
from wtool.writer import MANIFEST

LINEAR = "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj"


def sizes() -> dict[str, Any]:
    return {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


FAMILIES = {
    "llama": lambda: llama(),
    "tied": lambda: llama(tie_word_embeddings=True),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**sizes(), num_key_value_heads=2, intermediate_size=24)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=60)),
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """family -> base, and a model tuned from it in every parameter."""
    found = {}
    for family, make in FAMILIES.items():
        folder = tmp_path_factory.mktemp(family)
        torch.manual_seed(0)
        model = make()
        saved(model, folder / "base", with_tokenizer=False)
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape)
        saved(model, folder / "tuned", with_tokenizer=False)
        found[family] = folder / "base", folder / "tuned"
    return found


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def extracted(tuned, base, out, *flags):
    assert run(["extract-lora", str(tuned), "--base", str(base), "-o", str(out), *flags]) == 0
    return out


def nearest(delta, rank):
    u, s, v = torch.linalg.svd(delta.double(), full_matrices=False)
    return u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank]


def read_whole(base, out):
    """The model that wtool reads, in transformers."""
    read = open_checkpoint(f"{base}+{out}")
    model = AutoModelForCausalLM.from_pretrained(base, tie_word_embeddings=read.config.get("tie_word_embeddings"))
    model.load_state_dict({name: read.read(name) for name in read.tensors}, strict=False)
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_each_factor_pair_is_the_nearest_of_its_rank(pairs, tmp_path, family):
    base, tuned = pairs[family]
    out = extracted(tuned, base, tmp_path / "out", "--rank", "3")
    before, after = weights(base), weights(tuned)
    report = json.loads((out / MANIFEST).read_text())["report"]
    found = deltas(in_peft(base, out))
    assert found and found.keys() == report.keys()
    for module, delta in found.items():
        change = after[f"{module}.weight"].double() - before[f"{module}.weight"].double()
        torch.testing.assert_close(delta, nearest(change, 3), rtol=1e-5, atol=1e-6, msg=module)
        error = float((delta - change).norm() / change.norm())
        assert report[module]["relative_error"] == pytest.approx(error, rel=1e-4)
    layers = {name.removesuffix(".weight") for name in before if ".mlp." in name or "attn." in name}
    layers = {name for name in layers if not name.endswith("bias")}
    assert set(found) == layers | ({"lm_head"} if family in ("llama", "qwen2") else set())


@pytest.mark.parametrize("family", FAMILIES)
def test_with_all_ranks_and_all_modules_the_tuned_model_is_back(pairs, tmp_path, family, capsys):
    base, tuned = pairs[family]
    out = extracted(tuned, base, tmp_path / "out", "--rank", "1000", "--embed", "--save-modules")
    expected = AutoModelForCausalLM.from_pretrained(tuned).eval()
    if family in ("qwen2", "gpt2"):  # biases of modules that have factors have no place, and are told
        assert "bias (by" in capsys.readouterr().err
        factored = deltas(in_peft(base, out))
        for name, parameter in expected.named_parameters():
            if name.endswith("bias") and name.rpartition(".")[0] in factored:
                parameter.data = weights(base)[name]
    for model in (in_peft(base, out), read_whole(base, out)):
        torch.testing.assert_close(logits(model), logits(expected), rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("family", ["llama", "tied"])
def test_an_embedding_kept_whole(pairs, tmp_path, family):
    base, tuned = pairs[family]
    out = extracted(tuned, base, tmp_path / "out", "--rank", "1000", "--save-modules")
    expected = logits(AutoModelForCausalLM.from_pretrained(tuned).eval())
    for model in (in_peft(base, out), read_whole(base, out)):
        torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("flags", [[], ["--randomized"]])
def test_a_merged_adapter_comes_back(pairs, tmp_path, flags):
    """In bfloat16 the merged weights are rounded, and so is what comes back: by 2^-9 of a weight, not of its change."""
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(pairs["llama"][0]).bfloat16().save_pretrained(base)
    folder = adapter(base, tmp_path / "adapter", r=4, lora_alpha=2, target_modules=["q_proj", "down_proj"])
    with peft_quiet():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        merged = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
        merged.save_pretrained(tmp_path / "tuned")
    out = extracted(tmp_path / "tuned", base, tmp_path / "out", "--rank", "4", *flags)
    found, expected = deltas(in_peft(base, out)), deltas(in_peft(base, folder))
    assert found.keys() == expected.keys()
    assert set(settings(out)["target_modules"]) == {"q_proj", "down_proj"}
    for module, delta in expected.items():
        noise = 2.0**-9 * weights(tmp_path / "tuned")[f"{module}.weight"].double().norm()
        assert (found[module] - delta).norm() <= 2 * noise


@pytest.mark.parametrize("flags", [[], ["--randomized", "--max-rank", "12"], ["--max-rank", "5"]])
def test_ranks_by_energy(pairs, tmp_path, flags):
    base, tuned = pairs["llama"]
    out = extracted(tuned, base, tmp_path / "out", "--energy", "0.6", "--exclude", "lm_head|layers.1.mlp", *flags)
    before, after = weights(base), weights(tuned)
    most = int(flags[-1]) if flags else 1000
    ranks = {}
    for module, delta in deltas(in_peft(base, out)).items():
        assert not ("layers.1.mlp" in module or module == "lm_head")
        change = (after[f"{module}.weight"] - before[f"{module}.weight"]).double()
        kept = torch.linalg.svdvals(change).square().cumsum(0) / change.square().sum()
        ranks[module] = min(most, int((kept < 0.6).sum()) + 1)
        tolerance = 1.02 if "--randomized" in flags else 1.0001
        assert (delta - change).norm() <= tolerance * (nearest(change, ranks[module]) - change).norm()
        assert load_file(out / "adapter_model.safetensors")[f"base_model.model.{module}.lora_A.weight"].shape[
            0
        ] == pytest.approx(ranks[module], abs=1 if "--randomized" in flags else 0)
    assert len(set(ranks.values())) > 1 or most == 5


def test_old_names_of_gpt2_get_their_trunk(pairs, tmp_path):
    """The Hub's gpt2 says h.0.attn…, where the model that PEFT sees says transformer.h.0.attn…"""
    for name, folder in zip(("base", "tuned"), pairs["gpt2"], strict=True):
        shutil.copytree(folder, tmp_path / name)
        (tmp_path / name / "model.safetensors").unlink()
        plain = {key.removeprefix("transformer."): tensor for key, tensor in weights(folder).items()}
        save_file(plain, tmp_path / name / "model.safetensors", {"format": "pt"})
    old = extracted(tmp_path / "tuned", tmp_path / "base", tmp_path / "old", "--rank", "2", "--save-modules")
    new = extracted(pairs["gpt2"][1], pairs["gpt2"][0], tmp_path / "new", "--rank", "2", "--save-modules")
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (old, new))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    expected = logits(in_peft(tmp_path / "base", old))
    torch.testing.assert_close(logits(read_whole(pairs["gpt2"][0], old)), expected, rtol=1e-4, atol=1e-5)
    assert open_checkpoint(f"{tmp_path / 'base'}+{old}").tensors.keys() >= {"h.0.attn.c_attn.weight"}


def test_what_did_not_change_is_left_out(pairs, tmp_path):
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    model = AutoModelForCausalLM.from_pretrained(pairs["llama"][0])
    model.save_pretrained(base)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1.0
    model.save_pretrained(tuned)
    out = extracted(tuned, base, tmp_path / "out", "--rank", "2")
    assert settings(out)["target_modules"] == ["model.layers.1.mlp.up_proj"]
    (delta,) = deltas(in_peft(base, out)).values()
    torch.testing.assert_close(delta[0, 0], torch.tensor(1.0).double(), rtol=1e-5, atol=0.0)
    report = json.loads((out / MANIFEST).read_text())
    assert report["report"]["model.layers.1.mlp.up_proj"]["relative_error"] < 1e-6
    shutil.copytree(base, tmp_path / "same")
    assert run(["extract-lora", str(tmp_path / "same"), "--base", str(base), "-o", str(tmp_path / "no")]) == 3


def test_changes_that_are_left_are_told(pairs, tmp_path, capsys):
    base, tuned = pairs["tied"]
    out = extracted(tuned, base, tmp_path / "out", "--rank", "2", "--json")
    shown = capsys.readouterr()
    assert "changed, and not in the adapter: model.layers" in shown.err or "model.embed_tokens" in shown.err
    left = json.loads((out / MANIFEST).read_text())["left_out"]
    before, after = weights(base), weights(tuned)
    assert set(left) == {name for name in before if "norm" in name or "embed" in name}
    for name, change in left.items():
        assert change["size"] == pytest.approx(float((after[name] - before[name]).norm()), rel=1e-5)
        assert change["relative"] == pytest.approx(change["size"] / float(before[name].norm()), rel=1e-5)
    assert json.loads(shown.out)["modules"].keys() == deltas(in_peft(base, out)).keys()


def test_a_stopped_one_goes_on_and_gives_the_same_bytes(pairs, tmp_path, monkeypatch):
    base, tuned = pairs["llama"]
    command = ["--energy", "0.5", "--randomized", "--max-rank", "8", "--workers", "1"]
    whole = extracted(tuned, base, tmp_path / "whole", *command)
    looked, taken = [], []
    found_by, projected = svd.randomized, svd.project

    def looks(matrix, rank, key):
        looked.append(key)
        if len(looked) == 4:
            raise KeyboardInterrupt
        return found_by(matrix, rank, key)

    monkeypatch.setattr(svd, "randomized", looks)
    again = ["extract-lora", str(tuned), "--base", str(base), "-o", str(tmp_path / "out"), *command]
    assert run(again) == 130
    assert not (tmp_path / "out").exists()

    def projects(matrix, found, rank):
        taken.append(matrix)
        if len(taken) == 3:
            raise KeyboardInterrupt
        return projected(matrix, found, rank)

    monkeypatch.setattr(svd, "project", projects)
    assert run(again) == 130
    assert len(looked) < 4 + 15 + 4  # what was looked at before is not looked at again
    assert run(again) == 0
    assert len(taken) == 3 + 15 - 2
    files = {path.name: path.read_bytes() for path in whole.iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    before = len(looked)
    assert run(again) == 0 and len(looked) == before  # there already
    assert not (tmp_path / ".out.wtool").exists()


def test_an_output_of_something_else_is_not_touched(pairs, tmp_path, capsys):
    base, tuned = pairs["llama"]
    out = extracted(tuned, base, tmp_path / "out", "--rank", "2")
    command = ["extract-lora", str(tuned), "--base", str(base), "-o", str(out), "--rank", "3"]
    assert run(command) == 4
    assert "--force replaces it" in capsys.readouterr().err
    assert run([*command, "--force"]) == 0
    assert settings(out)["r"] == 3


def test_the_adapter_is_good_for_the_other_verbs(pairs, tmp_path):
    """Extracted, summed with itself by halves, and read: twice a half is one."""
    base, tuned = pairs["llama"]
    out = extracted(tuned, base, tmp_path / "out", "--rank", "2", "--dtype", "bf16")
    assert run(["merge-lora", str(out), str(out), "-w", "0.5", "-o", str(tmp_path / "sum")]) == 0
    one, two = open_checkpoint(f"{base}+{out}"), open_checkpoint(f"{base}+{tmp_path / 'sum'}")
    for name in one.tensors:
        torch.testing.assert_close(two.read(name), one.read(name), rtol=1e-5, atol=1e-6)


MISTAKES = [
    (["--rank", "2", "--energy", "0.5"], 2, "give either --rank (of every module) or --energy"),
    (["--energy", "1.5"], 2, "--energy 1.5: give a share above 0 and at most 1"),
    (["--rank", "2", "--max-rank", "4"], 2, "--max-rank goes with --energy"),
    (["--energy", "0.9", "--randomized"], 2, "needs --max-rank"),
    (["--include", "(q"], 2, "--include '(q': not a regular expression"),
    (["--include", "nothing"], 3, "have no tensor in common that is to be looked at"),
]


@pytest.mark.parametrize(("flags", "code", "message"), MISTAKES)
def test_mistakes_are_one_line_and_leave_nothing(pairs, tmp_path, capsys, flags, code, message):
    base, tuned = pairs["llama"]
    assert run(["extract-lora", str(tuned), "--base", str(base), "-o", str(tmp_path / "out"), *flags]) == code
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_another_vocabulary_is_refused_and_can_be_left_out(pairs, tmp_path, capsys):
    base, tuned = pairs["llama"]
    grown = AutoModelForCausalLM.from_pretrained(tuned)
    grown.resize_token_embeddings(330, mean_resizing=False)
    grown.save_pretrained(tmp_path / "grown")
    command = ["extract-lora", str(tmp_path / "grown"), "--base", str(base), "-o", str(tmp_path / "out")]
    assert run(command) == 3
    assert "--exclude REGEX leaves a module out" in capsys.readouterr().err
    assert run([*command, "--exclude", "embed_tokens|lm_head"]) == 0


def test_nan_is_named(pairs, tmp_path, capsys):
    base, _ = pairs["llama"]
    model = AutoModelForCausalLM.from_pretrained(base)
    model.model.layers[0].mlp.up_proj.weight.data[1, 2] = float("nan")
    model.save_pretrained(tmp_path / "bad")
    assert run(["extract-lora", str(tmp_path / "bad"), "--base", str(base), "-o", str(tmp_path / "out")]) == 5
    assert "tensor 'model.layers.0.mlp.up_proj.weight' has 1 values that are NaN" in capsys.readouterr().err
