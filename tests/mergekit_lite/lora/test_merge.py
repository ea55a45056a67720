"""`wtool merge-lora`: what PEFT adds to the weights is what the definition says."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from lora_adapters import adapter, deltas, in_peft, logits, peft_quiet, settings
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tiny_models import llama, saved
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from mergekit_lite.methods.ties import ties
from wtool.checkpoint import open_checkpoint
from wtool.cli import run
from wtool.writer import MANIFEST

ATTENTION = ["q_proj", "v_proj"]
KINDS = {  # case -> the settings of its adapters
    "plain": [{"r": 4, "lora_alpha": 12, "target_modules": ATTENTION}] * 2,
    "ranks": [{"r": 2, "lora_alpha": 3, "target_modules": ATTENTION}, {"r": 5, "target_modules": ATTENTION}],
    "modules": [{"r": 2, "target_modules": ["q_proj"]}, {"r": 3, "target_modules": ["q_proj", "down_proj"]}],
    "scales": [
        {
            "r": 4,
            "lora_alpha": 6,
            "use_rslora": True,
            "target_modules": ATTENTION,
            "rank_pattern": {"q_proj": 9},
            "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 5},
        },
        {"r": 3, "target_modules": "all-linear"},
        {"r": 1, "target_modules": r".*layers\.1\.mlp\.(up|down)_proj"},
    ],
    "embedding": [{"r": 2, "target_modules": ["embed_tokens", "lm_head"]}, {"r": 3, "target_modules": ATTENTION}],
    "layers": [{"r": 2, "target_modules": ATTENTION, "layers_to_transform": [1]}] * 2,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved(llama(), tmp_path_factory.mktemp("lora") / "base", with_tokenizer=False)


def made(base, folder, kind):
    return [adapter(base, folder / f"a{i}", seed=i, **each) for i, each in enumerate(KINDS[kind])]


def combined(adapters, out, *flags):
    assert run(["merge-lora", *map(str, adapters), "-o", str(out), *flags]) == 0
    return out


def sums(base, adapters, weight):
    total = {}
    for folder, w in zip(adapters, weight, strict=True):
        for module, delta in deltas(in_peft(base, folder)).items():
            total[module] = total.get(module, 0) + w * delta
    return total


def near(found, expected, step=2e-6):
    assert found.keys() == expected.keys()
    for module, delta in expected.items():
        torch.testing.assert_close(found[module], delta, rtol=step, atol=step * float(delta.abs().max()), msg=module)


@pytest.mark.parametrize("method", ["concat", "knots", "core"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_sum_is_exact_whatever_the_adapters_train(base, tmp_path, kind, method):
    adapters = made(base, tmp_path, kind)
    weight = [0.5, -1.25, 2.0][: len(adapters)]
    flags = [text for w in weight for text in ("-w", str(w))]
    flags += ["-m", method] + ([] if method == "concat" else ["--merge", "task_arithmetic"])
    out = combined(adapters, tmp_path / "out", *flags)
    near(deltas(in_peft(base, out)), sums(base, adapters, weight))
    assert set(settings(out)["rank_pattern"].values()) == set(settings(out)["alpha_pattern"].values())


@pytest.mark.parametrize("rank", [1, 3, 100])
def test_svd_is_the_nearest_of_its_rank_and_tells_how_near(base, tmp_path, rank):
    adapters = made(base, tmp_path, "modules")
    out = combined(adapters, tmp_path / "out", "-m", "svd", "--rank", str(rank))
    expected = {}
    report = json.loads((out / MANIFEST).read_text())["report"]
    for module, delta in sums(base, adapters, [1.0, 1.0]).items():
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
        expected[module] = u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank]
        error = float(s[rank:].norm() / s.norm())
        assert report[module]["relative_error"] == pytest.approx(error, abs=1e-6)
    near(deltas(in_peft(base, out)), expected)


def test_knots_with_ties_is_the_definition_on_full_matrices(base, tmp_path):
    adapters = made(base, tmp_path, "modules")
    weight, density = [1.0, 0.5], [0.3, 0.6]
    flags = ["-w", "1", "-w", "0.5", "--density", "0.3", "--density", "0.6", "--lambda", "0.7"]
    out = combined(adapters, tmp_path / "out", "-m", "knots", *flags)
    each = [deltas(in_peft(base, folder)) for folder in adapters]
    expected = {}
    for module, second in each[1].items():
        parts = [each[0].get(module, torch.zeros_like(second)), second]
        u, s, v = torch.linalg.svd(torch.cat(parts, 1), full_matrices=False)
        rank = int((s > 1e-6 * s[0]).sum())
        aligned = [part.contiguous() for part in v[:rank].split(second.shape[1], dim=1)]
        aligned[0] *= bool(parts[0].any())  # rounding must not have a say where there is no update
        merged = ties(torch.zeros_like(aligned[0]), aligned, weight=weight, density=density, lambda_=0.7)
        expected[module] = u[:, :rank] @ torch.diag(s[:rank]) @ merged
    near(deltas(in_peft(base, out)), expected, step=1e-5)


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties"])
def test_random_masks_depend_on_the_seed_alone(base, tmp_path, kind):
    adapters = made(base, tmp_path, "modules")
    flags = ["-m", "core", "--merge", kind, "--density", "0.5"]
    files = [
        combined(adapters, tmp_path / f"o{seed}{workers}", *flags, "--seed", seed, "--workers", workers)
        for seed, workers in (("1", "1"), ("1", "3"), ("2", "1"))
    ]
    first, again, other = (file.joinpath("adapter_model.safetensors").read_bytes() for file in files)
    assert first == again != other


def test_peft_says_the_same_of_a_sum_and_of_its_cut(base, tmp_path):
    # without rsLoRA, which PEFT carries over from the first adapter into the sum
    adapters = made(base, tmp_path, "plain")[:1] + made(base, tmp_path / "more", "ranks")
    weight = [0.7, 1.0, -0.4]
    flags = [text for w in weight for text in ("-w", str(w))]
    ours = {"cat": combined(adapters, tmp_path / "cat", *flags)}
    ours["svd"] = combined(adapters, tmp_path / "svd", *flags, "-m", "svd", "--rank", "3")
    with peft_quiet():
        model = in_peft(base, adapters[0])
        for i, folder in enumerate(adapters):
            model.load_adapter(str(folder), f"a{i}")
        names = [f"a{i}" for i in range(3)]
        for kind, more in (("cat", {}), ("svd", {"svd_rank": 3, "svd_full_matrices": False})):
            model.add_weighted_adapter(names, weight, kind, combination_type=kind, **more)
    for kind, folder in ours.items():
        for module, delta in deltas(in_peft(base, folder)).items():
            layer = model.get_submodule(f"base_model.model.{module}")
            theirs = layer.get_delta_weight(kind).double()
            torch.testing.assert_close(theirs, delta, rtol=1e-4, atol=2e-5, msg=f"{kind} {module}")


def test_the_model_is_the_one_that_wtool_reads(base, tmp_path, capsys):
    adapters = made(base, tmp_path, "scales")
    out = combined(adapters, tmp_path / "out", "-m", "svd")
    assert "modules, ranks" in capsys.readouterr().out
    read = open_checkpoint(f"{base}+{out}")
    whole = AutoModelForCausalLM.from_pretrained(base).eval()
    whole.load_state_dict({name: read.read(name) for name in read.tensors})
    torch.testing.assert_close(logits(whole), logits(in_peft(base, out)), rtol=1e-4, atol=1e-4)


def test_gpt2_lies_the_other_way(tmp_path):
    torch.manual_seed(0)
    base = saved(
        GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=60)),
        tmp_path / "base",
        with_tokenizer=False,
    )
    kind = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    adapters = [adapter(base, tmp_path / f"a{i}", seed=i, r=2 + i, **kind) for i in range(2)]
    out = combined(adapters, tmp_path / "out")
    near(deltas(in_peft(base, out)), sums(base, adapters, [1.0, 1.0]))


def test_modules_to_save_are_averaged(base, tmp_path):
    kind = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}
    adapters = [adapter(base, tmp_path / f"a{i}", seed=i, **kind) for i in range(2)]
    out = combined(adapters, tmp_path / "out", "-w", "1", "-w", "3")
    in_peft(base, out)
    held = [load_file(folder / "adapter_model.safetensors") for folder in (*adapters, out)]
    for name in ("base_model.model.lm_head.weight", "base_model.model.model.norm.weight"):
        torch.testing.assert_close(held[2][name], (held[0][name] + 3 * held[1][name]) / 4)


def test_one_adapter_alone_is_itself_with_its_scale_inside(base, tmp_path):
    (first, *_) = made(base, tmp_path, "scales")
    out = combined([first], tmp_path / "out", "--dtype", "bfloat16")
    near(deltas(in_peft(base, out)), sums(base, [first], [1.0]), step=2**-7)
    assert {tensor.dtype for tensor in load_file(out / "adapter_model.safetensors").values()} == {torch.bfloat16}


def test_twice_the_same_command_does_nothing_and_json_tells(base, tmp_path, capsys):
    adapters = made(base, tmp_path, "plain")
    command = ["merge-lora", *map(str, adapters), "-m", "svd", "-o", str(tmp_path / "out"), "--json"]
    assert run(command) == 0
    told = json.loads(capsys.readouterr().out)
    assert {entry["rank"] for entry in told["modules"].values()} == {4} and not told["already_there"]
    assert run(command) == 0
    assert json.loads(capsys.readouterr().out)["already_there"]
    assert run([*command[:-3], "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []


def changed_settings(folder, to, **changes):
    shutil.copytree(folder, to)
    (to / "adapter_config.json").write_text(json.dumps(settings(folder) | changes))
    return to


def test_another_alpha_is_other_work(base, tmp_path, capsys):
    first, second = made(base, tmp_path, "plain")
    out = combined([first, second], tmp_path / "out")
    (first / "adapter_config.json").write_text(json.dumps(settings(first) | {"lora_alpha": 1}))
    command = ["merge-lora", str(first), str(second), "-o", str(out)]
    assert run(command) == 4
    assert run([*command, "--force"]) == 0
    near(deltas(in_peft(base, out)), sums(base, [first, second], [1.0, 1.0]))


def test_other_bases_are_refused_unless_told(base, tmp_path, capsys):
    first, second = made(base, tmp_path, "plain")
    other = changed_settings(second, tmp_path / "other", base_model_name_or_path="org/other")
    command = ["merge-lora", str(first), str(other), "-o", str(tmp_path / "out")]
    assert run(command) == 3
    assert f"is of the base org/other, {first} of {base}; --ignore-bases combines" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run([*command, "--ignore-bases"]) == 0
    assert "warning: " in capsys.readouterr().err


def test_what_is_not_plain_lora_is_refused_by_name(base, tmp_path, capsys):
    first, _ = made(base, tmp_path, "plain")
    dora = adapter(base, tmp_path / "dora", r=2, target_modules=["q_proj"], use_dora=True)
    biased = adapter(base, tmp_path / "biased", r=2, target_modules=["q_proj"], bias="all")
    lone = adapter(base, tmp_path / "lone", r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    small = tmp_path / "small"
    shutil.copytree(first, small)
    held = {
        n: t[:, :5].contiguous() if "lora_A" in n else t
        for n, t in load_file(first / "adapter_model.safetensors").items()
    }
    (small / "adapter_model.safetensors").unlink()
    save_file(held, small / "adapter_model.safetensors")
    cases = {
        dora: "'use_dora' is not merged",
        biased: "trains biases",
        lone: "whole and",
        small: "of unlike bases",
        changed_settings(first, tmp_path / "rank", r=7): "says 7",
    }
    capsys.readouterr()
    for folder, message in cases.items():
        assert run(["merge-lora", str(first), str(folder), "-o", str(tmp_path / "out")]) == 3
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


MISTAKES = [
    (["-m", "cat"], "--method 'cat': take concat, svd, knots, core; did you mean 'concat'?"),
    (["-w", "1", "-w", "2", "-w", "3"], "--weight is given 3 times for 2 adapters"),
    (["--rank", "3"], "--rank 3: concat cuts nothing (--method svd does)"),
    (["--density", "0.5"], "--density is for --method knots or core"),
    (["-m", "knots", "--density", "1.5"], "give a share from 0 to 1"),
    (["-m", "knots", "--merge", "tie"], "--merge 'tie': take task_arithmetic, ties"),
]


@pytest.mark.parametrize(("flags", "message"), MISTAKES)
def test_mistakes_are_one_line(base, tmp_path, capsys, flags, message):
    assert run(["merge-lora", "a", "b", *flags, "-o", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1
    assert list(Path(tmp_path).iterdir()) == []


def test_a_folder_that_is_no_adapter(base, tmp_path, capsys):
    assert run(["merge-lora", str(base), "-o", str(tmp_path / "out")]) == 3
    assert "not a LoRA adapter" in capsys.readouterr().err


def test_peft_knows_every_setting_written(base, tmp_path):
    out = combined(made(base, tmp_path, "plain"), tmp_path / "out")
    assert LoraConfig.from_pretrained(str(out)).to_dict().keys() >= settings(out).keys()
