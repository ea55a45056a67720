"""`wtool merge` as a user runs it, on a tiny llama, opened again in transformers."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import merge_definitions as definition
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mergekit_lite.methods.table import METHODS
from mergekit_lite.recipe import ON_INPUTS
from wtool.cli import run


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """base, and a, b tuned from it; b in shards, c in float16."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        tie_word_embeddings=False,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(folder / "base")
    for name in ("a", "b"):
        for parameter in model.parameters():
            parameter.data = (parameter.data.float() + 0.02 * torch.randn(parameter.shape)).bfloat16()
        model.save_pretrained(folder / name, max_shard_size="20KB" if name == "b" else "1GB")
    for path in folder.iterdir():
        (path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"x": 0, "y": 1}}, "added_tokens": []}))
    old = os.getcwd()
    os.chdir(folder)
    yield folder
    os.chdir(old)


def weights(folder):
    return {k: v for path in sorted(Path(folder).glob("*.safetensors")) for k, v in load_file(path).items()}


def lists(*tensors):
    return [tensor.double().reshape(-1).tolist() for tensor in tensors]


CASES = {
    "linear": (["-m", "linear", "-w", "0.3", "-w", "0.7"], lambda b, m: definition.linear(m, weight=[0.3, 0.7])),
    "slerp": (["-m", "slerp", "-t", "0.3"], lambda b, m: definition.slerp(m, t=0.3)),
    "task_arithmetic": (
        ["-m", "task_arithmetic", "--base", "base", "-w", "0.5", "-w", "-0.5", "--lambda", "0.9"],
        lambda b, m: definition.task_arithmetic(b, m, weight=[0.5, -0.5], lambda_=0.9),
    ),
    "ties": (
        ["-m", "ties", "--base", "base", "--density", "0.5", "-w", "0.5", "-w", "0.5"],
        lambda b, m: definition.ties(b, m, weight=[0.5, 0.5], density=[0.5, 0.5]),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_result_opens_and_is_the_definition(models, tmp_path, case):
    flags, merge = CASES[case]
    assert run(["merge", "a", "b", *flags, "-o", str(tmp_path / "out")]) == 0
    base, a, b = weights("base"), weights("a"), weights("b")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert found.keys() == base.keys()
    for name, tensor in found.items():
        expected = torch.tensor(merge(*lists(base[name]), lists(a[name], b[name]))).reshape(tensor.shape)
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.double(), expected.double(), rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_is_the_same_each_time_and_on_any_number_of_workers(models, tmp_path, method):
    command = ["merge", "a", "b", "-m", method, "--base", "base", "--density", "0.5", "--seed", "3"]
    for number, workers in enumerate(["1", "2", "5"]):
        assert run([*command, "-o", str(tmp_path / f"{number}"), "--workers", workers]) == 0
    folders = [{p.name: p.read_bytes() for p in (tmp_path / f"{number}").iterdir()} for number in range(3)]
    assert folders[0] == folders[1] == folders[2]
    assert run([*command[:-1], "4", "-o", str(tmp_path / "other")]) == 0
    assert not all(torch.equal(x, weights(tmp_path / "other")[k]) for k, x in weights(tmp_path / "0").items())


def test_the_base_that_all_cards_name_is_taken(models, tmp_path, capsys):
    for name in ("base", "a", "b"):
        shutil.copytree(name, tmp_path / name)
    for name in ("a", "b"):
        (tmp_path / name / "README.md").write_text("---\nbase_model: base\n---\ntext\n")
    command = ["merge", str(tmp_path / "a"), str(tmp_path / "b"), "-m", "ties", "--density", "0.5"]
    assert run([*command, "-o", str(tmp_path / "out")]) == 0
    assert f"took {tmp_path / 'base'}, which the cards of all models name" in capsys.readouterr().err
    assert run([*command, "--base", str(tmp_path / "base"), "-o", str(tmp_path / "same")]) == 0
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "same/model.safetensors").read_bytes()
    (tmp_path / "b/README.md").write_text("---\nbase_model: org/other\n---\ntext\n")
    assert run([*command, "-o", str(tmp_path / "out2")]) == 2
    assert "ties needs a base" in capsys.readouterr().err


def test_generates(models, tmp_path):
    assert run(["merge", "a", "b", "-o", str(tmp_path / "out")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, pad_token_id=0, do_sample=False).shape == (1, 7)


def test_yaml_and_flags_are_the_same(models, tmp_path):
    (tmp_path / "r.yml").write_text(
        "merge_method: ties\nbase_model: base\nmodels:\n- {model: a, parameters: {weight: 0.5}}\n"
        "- {model: b, parameters: {weight: 0.25}}\nparameters: {density: 0.5}\n"
    )
    assert run(["merge", str(tmp_path / "r.yml"), "-o", str(tmp_path / "yaml")]) == 0
    flags = ["-m", "ties", "--base", "base", "-w", "0.5", "-w", "0.25", "--density", "0.5"]
    assert run(["merge", "a", "b", *flags, "-o", str(tmp_path / "flags")]) == 0
    assert (tmp_path / "yaml/model.safetensors").read_bytes() == (tmp_path / "flags/model.safetensors").read_bytes()


def test_the_card_holds_the_recipe(models, tmp_path):
    assert run(["merge", "a", "b", "-m", "slerp", "-t", "0.3", "-o", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    (tmp_path / "again.yml").write_text(card.split("```yaml\n")[1].split("```")[0])
    assert run(["merge", str(tmp_path / "again.yml"), "-o", str(tmp_path / "again")]) == 0
    assert weights(tmp_path / "out").keys() == weights(tmp_path / "again").keys()
    assert all(torch.equal(x, weights(tmp_path / "again")[k]) for k, x in weights(tmp_path / "out").items())


def test_the_type_asked_for(models, tmp_path):
    assert run(["merge", "a", "b", "--dtype", "fp16", "-o", str(tmp_path / "out"), "--shard-size", "20kB"]) == 0
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.float16}
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float16


def test_json_and_exit_codes(models, tmp_path, capsys):
    command = ["merge", "a", "b", "-o", str(tmp_path / "out"), "--json"]
    assert run(command) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["tensors"] == len(weights("a")) and not first["already_there"]
    assert run(command) == 0
    assert json.loads(capsys.readouterr().out)["already_there"]


def test_a_dry_run_writes_nothing_and_tells_all_problems(models, tmp_path, capsys):
    odd = weights("a")
    del odd["model.norm.weight"]
    odd["model.embed_tokens.weight"] = torch.ones(65, 32).bfloat16()
    (tmp_path / "odd").mkdir()
    save_file(odd, tmp_path / "odd/model.safetensors")
    (tmp_path / "odd/config.json").write_text(Path("a/config.json").read_text())
    before = sorted(tmp_path.rglob("*"))
    assert run(["merge", "a", str(tmp_path / "odd"), "--dry-run", "--json"]) == 3
    problems = "\n".join(json.loads(capsys.readouterr().out)["problems"])
    assert "tensor 'model.norm.weight' is in a and not in" in problems
    assert "tensor 'model.embed_tokens.weight' is [64, 32] in a and [65, 32] in" in problems
    assert sorted(tmp_path.rglob("*")) == before
    assert run(["merge", "a", str(tmp_path / "odd"), "-o", str(tmp_path / "out")]) == 3
    assert "more: --dry-run lists them" in capsys.readouterr().err


MISTAKES = [
    (["merge", "a", "b"], 2, "where to? give the output folder with -o OUT"),
    (["merge", "a", "bb", "-o", "x"], 3, "bb: no such file or folder; did you mean 'b'?"),
    (["merge", "a", "b", "-m", "tiess", "-o", "x"], 2, "no merge method 'tiess'; did you mean 'ties'?"),
    (["merge", "a", "b", "-m", "ties", "-o", "x"], 2, "ties needs a base"),
    (["merge", "a", "b", "-m", "slerp", "-o", "x"], 2, "slerp needs 't': -t"),
    (["merge", "a", "-m", "slerp", "-t", "0.5", "-o", "x"], 2, "slerp takes 2 model(s); 1 are given"),
    (["merge", "a", "b", "-w", "1", "-w", "2", "-w", "3", "-o", "x"], 2, "--weight is given 3 times for 2 models"),
    (["merge", "a", "b", "-w", "1", "-w", "-1", "-o", "x"], 2, "sum to 0"),
    (
        ["merge", "a", "b", "-m", "ties", "--base", "base", "--density", "2", "-o", "x"],
        2,
        "'density' is 2.0; it must be",
    ),
    (["merge", "a", "b", "--density", "0.5", "-o", "x"], 2, "linear has no parameter 'density'"),
    (["merge", "a", "b", "-o", "a/x"], 2, "is inside the input a"),
    (["merge", "a", "b", "-o", "a"], 2, "an input is never changed"),
    (["merge", "a", "b", "-o", "."], 2, "holds the input a"),
    (["merge", "a", "b", "-o", "x", "--shard-size", "big"], 2, "'big' is not a size"),
    (["merge", "a", "b", "--densty", "1", "-o", "x"], 2, "No such option: --densty"),
    (["merg", "a"], 2, "no verb 'merg'; did you mean 'merge'?"),
]


@pytest.mark.parametrize(("command", "code", "message"), MISTAKES)
def test_mistakes_are_one_line_and_leave_nothing(models, capsys, command, code, message):
    assert run(command) == code
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.count("\n") == 1 and shown.err.startswith("error: ")
    assert not Path("x").exists() and not Path(".x.wtool").exists()


def test_nan_is_named_and_the_output_stays_away(models, tmp_path, capsys):
    bad = weights("b")
    bad["model.norm.weight"][3] = float("nan")
    (tmp_path / "bad").mkdir()
    save_file(bad, tmp_path / "bad/model.safetensors")
    (tmp_path / "bad/config.json").write_text(Path("b/config.json").read_text())
    command = ["merge", "a", str(tmp_path / "bad"), "-o", str(tmp_path / "out")]
    assert run(command) == 5
    assert "bad: tensor 'model.norm.weight' has nan at element 3; --allow-nonfinite" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run([*command, "--allow-nonfinite"]) == 0


def test_overflow_is_named(models, tmp_path, capsys):
    assert (
        run(["merge", "a", "b", "--no-normalize", "-w", "1e9", "--dtype", "float16", "-o", str(tmp_path / "out")]) == 5
    )
    assert "the result is" in capsys.readouterr().err


def test_tied_and_untied_heads(models, tmp_path):
    """A tied model has its embedding for a head; the merge of a tied and an untied one is untied."""
    tied = weights("a")
    del tied["lm_head.weight"]
    (tmp_path / "tied").mkdir()
    save_file(tied, tmp_path / "tied/model.safetensors")
    config = json.loads(Path("a/config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "tied/config.json").write_text(json.dumps(config))
    for first, second in ((str(tmp_path / "tied"), "b"), ("b", str(tmp_path / "tied"))):
        out = tmp_path / f"out{len(first)}"
        assert run(["merge", first, second, "-o", str(out)]) == 0
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
        mean = (tied["model.embed_tokens.weight"].float() + weights("b")["lm_head.weight"].float()) / 2
        torch.testing.assert_close(weights(out)["lm_head.weight"].float(), mean, rtol=2**-8, atol=1e-6)
    assert run(["merge", str(tmp_path / "tied"), str(tmp_path / "tied"), "-o", str(tmp_path / "both")]) == 0
    assert "lm_head.weight" not in weights(tmp_path / "both")
    assert json.loads((tmp_path / "both/config.json").read_text())["tie_word_embeddings"] is True


def test_unlike_tokenizers_are_refused(models, tmp_path, capsys):
    for name, vocabulary in (("other", {"x": 1, "y": 0}), ("more", {"x": 0, "y": 1, "z": 2})):
        (tmp_path / name).mkdir()
        for path in Path("a").iterdir():
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
        tokenizer = {"model": {"vocab": vocabulary}, "added_tokens": []}
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert run(["merge", "a", str(tmp_path / "other"), "-o", str(tmp_path / "out")]) == 3
    assert "2 of 2 tokens have other numbers" in capsys.readouterr().err
    assert run(["merge", "a", str(tmp_path / "other"), "--ignore-tokenizers", "-o", str(tmp_path / "out")]) == 0
    assert run(["merge", "a", str(tmp_path / "more"), "-o", str(tmp_path / "out2")]) == 0
    assert "warning: tokenizers differ: 1 tokens are only in one" in capsys.readouterr().err


def test_donor_is_the_base_else_the_first(models, tmp_path):
    for command, donor in ((["-m", "ties", "--base", "base"], "base"), ([], "a")):
        out = tmp_path / donor
        assert run(["merge", "a", "b", *command, "-o", str(out)]) == 0
        assert (out / "generation_config.json").read_bytes() == Path(donor, "generation_config.json").read_bytes()


def test_help_imports_no_torch():
    commands = "run(['--help']); run(['merge', '--help']); run(['eval', '--help'])"
    code = f"import sys; from wtool.cli import run; {commands}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_a_bound_on_memory_changes_no_byte(models, tmp_path, capsys):
    """The largest results are 4 kB: the embedding and the head."""
    for name, options in {"free": [], "bound": ["--memory", "4096", "--workers", "4"]}.items():
        assert run(["merge", "a", "b", "-o", str(tmp_path / name), *options]) == 0
    free, bound = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("free", "bound"))
    assert free == bound
    capsys.readouterr()
    assert run(["merge", "a", "b", "--memory", "4095", "--dry-run"]) == 2
    assert "alone takes 4.1 kB" in capsys.readouterr().err
    assert run(["merge", "a", "b", "--memory", "5000", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["peak_memory_bytes"] == 5000


def test_the_help_names_every_method(capsys):
    assert run(["merge", "--help"]) == 0
    told = set(capsys.readouterr().out.replace(",", " ").split())
    assert {*METHODS, *ON_INPUTS} <= told
