"""`wtool prune` as a user runs it: what it says, what it refuses, and what can be done with the result."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from families import saved_family
from hub_server import HubServer
from killing import contents
from pruned_models import manifest
from safetensors.torch import load_file, save_file
from tiny_models import llama, saved
from transformers import AutoModelForCausalLM, PreTrainedModel

from wtool.cli import run
from wtool.loading import quiet

Prune = Callable[..., Path]
Full = Callable[[str], tuple[PreTrainedModel, Path]]
Shown = pytest.CaptureFixture[str]
WALK = ["--samples", "8", "--seqlen", "48"]
SIZES = ["--ffn", "40", "--heads", "2"]
WANDA = ["-m", "wanda", "--sparsity", "0.5"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (SIZES, "ffn 48 to 40, heads 4 to 2; 36,000 parameters become 32,416, 144.0 kB become 129.7 kB"),
        (["--layers", "1"], "layers 2 to 1; 36,000 parameters become 28,256"),
        (WANDA, "7,680 of 15,360 weights of 14 layers (50.00%) dropped by wanda, 50 % dropped; 144.0 kB become 144.0"),
        (
            ["-m", "ria", "--pattern", "2:4"],
            "ria, 2:4 (2 kept of every 4 neighbours); 144.0 kB become 144.0 kB: zeros ",
        ),
        (["-m", "magnitude", "--sparsity", "0.5", "--pack"], "bytes"),
        (["-m", "svd", "--rank-ratio", "0.5"], "14 layers by svd hold 4"),
    ],
)
def test_a_plan_is_shown_from_headers_alone(
    hub: HubServer, full: Full, flags: list[str], told: str, capsys: Shown
) -> None:
    _, folder = full("llama")
    hub.add("org/name", folder)
    capsys.readouterr()
    assert run(["prune", "org/name", *flags, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("org/name: ") and shown.endswith("no problem found\n")
    assert told in shown or told == "bytes" and "unpacked by wtool alone" in shown
    assert hub.sent("model.safetensors") <= 100_000  # what is fetched of a file for its header


def test_a_plan_as_json(full: Full, capsys: Shown) -> None:
    _, folder = full("llama")
    capsys.readouterr()
    assert run(["prune", str(folder), *SIZES, "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["sizes"] == {"ffn": [48, 40], "heads": [4, 2]}
    assert (told["params_before"], told["params_after"]) == (36000, 32416)


@pytest.mark.parametrize("flags", [SIZES, WANDA])
def test_what_was_done_as_json(full: Full, text: Path, flags: list[str], tmp_path: Path, capsys: Shown) -> None:
    _, folder = full("llama")
    capsys.readouterr()
    command = ["prune", str(folder), *flags, "--calib", str(text), *WALK, "-o", str(tmp_path / "out"), "--json", "-q"]
    for already_there in (False, True):
        assert run(command) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["output"] == str(tmp_path / "out") and told["already_there"] is already_there
        assert told["report"] == manifest(tmp_path / "out")["report"] and told["fallbacks"] == {}
    assert told["bytes_before"] == 144000


@pytest.mark.parametrize("flags", [SIZES, WANDA, ["-m", "svd", "--rank-ratio", "0.5"]])
def test_what_is_there_is_not_done_again(full: Full, prune: Prune, flags: list[str], capsys: Shown) -> None:
    _, folder = full("llama")
    stamp = (prune(folder, *flags) / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    assert (prune(folder, *flags) / "model.safetensors").stat().st_mtime_ns == stamp
    assert "there already" in capsys.readouterr().out
    assert (prune(folder, *flags, "--force") / "model.safetensors").stat().st_mtime_ns != stamp


@pytest.mark.parametrize("flags", [[*SIZES, "--hidden", "24"], ["-m", "sparsegpt", "--pattern", "2:4"]])
def test_a_recipe_file_and_the_recipe_in_a_manifest_give_the_same_bytes(
    full: Full, text: Path, flags: list[str], prune: Prune, tmp_path: Path
) -> None:
    _, folder = full("llama")
    expected = contents(prune(folder, *flags, name="options"))
    keys = {flag.lstrip("-"): value for flag, value in zip(flags[::2], flags[1::2], strict=True)}
    named = {
        {"m": "method"}.get(key, key): value if key in ("m", "pattern") else int(value) for key, value in keys.items()
    }
    recipe = {"model": str(folder), **named, "calibration": {"data": [str(text)], "samples": 8, "seqlen": 48}}
    told = manifest(tmp_path / "options")["recipe"]
    for number, content in enumerate((recipe, told)):
        (tmp_path / f"{number}.yml").write_text(yaml.safe_dump(content))
        out = tmp_path / f"out{number}"
        assert run(["prune", str(tmp_path / f"{number}.yml"), "-o", str(out), "--quiet"]) == 0
        assert contents(out) == expected
    card = expected["README.md"].decode()
    block = card.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(block) == told["prune"]


REFUSED: list[tuple[list[str], int, str]] = [
    (["-m", "wnda", "--sparsity", "0.5"], 2, "no pruning method 'wnda'; did you mean 'wanda'? (there are magnitude,"),
    (["-m", "wanda", "--sparsity", "1.2"], 2, "sparsity 1.2 is not a share of the weights to drop"),
    (["-m", "wanda", "--pattern", "4:2"], 2, "pattern 4:2 is not N kept of every M"),
    (["-m", "wanda", "--rank-ratio", "0.5"], 2, "method 'wanda' takes sparsity or pattern"),
    (["-m", "svd", "--rank-ratio", "0"], 2, "rank ratio 0 is not a share of the parameters to keep"),
    ([*WANDA, "--layers", "1"], 2, "'layers' and method 'wanda' are two prunings: do one after the other"),
    (["--sparsity", "0.5"], 2, "'sparsity' needs a method"),
    ([], 2, "what is to go? give sizes to keep"),
    (["--layers", "0"], 2, "has 2 layers, of which 0 cannot be kept; 1 to 2 can"),
    (["--layers", "99"], 2, "has 2 layers, of which 99 cannot be kept"),
    (["--layers", "0,99"], 2, "there is no layer 99: the model has layers 0 to 1"),
    (["--layers", "some"], 2, "--layers 'some': give how many layers (15), or their numbers with commas (0,2,5)"),
    (["--heads", "3"], 2, "3 heads cannot be shared out evenly over 2 key-value heads; take a multiple of 2"),
    (["--heads", "3", "--kv-heads", "1"], 2, "key-value heads go with their 2 query heads each; leave out --heads"),
    (["--heads", "8"], 2, "has heads 4, of which 8 cannot be kept"),
    (["--experts", "2"], 2, "a llama has no experts"),
    (["--hidden", "0"], 2, "'hidden': input should be greater than or equal to 1"),
    (["--layers", "1", "--depth-score", "angle"], 2, "no score of layers 'angle'; did you mean 'angular'?"),
    (["--params", "many"], 2, "--params 'many': give a number of parameters"),
    ([*WANDA, "--stats", "nowhere"], 3, "no statistics here"),
    ([*SIZES, "--stats", "nowhere"], 2, "statistics are for methods"),
    ([*WANDA, "--calib", "nowhere.txt"], 3, "nowhere.txt: no such"),
    ([*WANDA, "--ignore", "layers"], 2, "no linear layer is left to prune"),
]


@pytest.mark.parametrize(("flags", "code", "message"), REFUSED)
def test_what_cannot_be_done_is_told_in_one_line(
    flags: list[str], code: int, message: str, full: Full, tmp_path: Path, capsys: Shown
) -> None:
    _, folder = full("llama")
    capsys.readouterr()
    assert run(["prune", str(folder), *flags, "-o", str(tmp_path / "out"), "--quiet"]) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("qwen3_moe", ["--ffn", "32"], "all its feed-forward blocks are of experts; their channels are --expert-ffn"),
        ("qwen3_moe", ["--expert-ffn", "12"], "transformers multiplies experts by 8 channels; expert_ffn 12 is no"),
        ("gpt2", ["--hidden", "24"], "hidden must be heads × 8: 4 heads go with hidden 32, not with 24"),
        ("opt", ["--ffn", "32"], "only whole layers can be taken out of a 'opt'"),
    ],
)
def test_what_a_family_cannot_have(name: str, flags: list[str], message: str, full: Full, capsys: Shown) -> None:
    _, folder = full(name)
    capsys.readouterr()
    assert run(["prune", str(folder), *flags, "--dry-run"]) == 2
    assert message in capsys.readouterr().err


def test_beside_a_recipe_file_nothing_else_is_taken_and_a_place_is_needed(tmp_path: Path, capsys: Shown) -> None:
    (tmp_path / "r.yml").write_text("model: m\nlayers: 1\n")
    assert run(["prune", str(tmp_path / "r.yml"), "--ffn", "3", "-o", str(tmp_path / "out")]) == 2
    assert "'ffn' cannot be given beside it" in capsys.readouterr().err
    assert run(["prune", "m", "--layers", "1"]) == 2
    assert "where to? give the output folder with -o OUT" in capsys.readouterr().err


def test_magnitudes_need_no_tokenizer_and_wanda_does(tmp_path: Path, capsys: Shown) -> None:
    folder = saved(llama(), tmp_path / "model", with_tokenizer=False)
    out = tmp_path / "out"
    for method in (["magnitude", "--sparsity", "0.5"], ["svd", "--rank-ratio", "0.5"]):
        assert run(["prune", str(folder), "-m", *method, "-o", str(out), "--force", "-q"]) == 0
    capsys.readouterr()
    assert run(["prune", str(folder), *WANDA, "-o", str(out), "--force", "-q"]) == 3
    assert "no tokenizer beside the weights" in capsys.readouterr().err


def test_a_matrix_that_too_few_tokens_came_to_is_named(prune: Prune, tmp_path: Path, capsys: Shown) -> None:
    saved_family("mixtral", tmp_path / "model", num_hidden_layers=1, num_local_experts=24)
    prune(tmp_path / "model", "--expert-ffn", "24", name="small")
    shown = capsys.readouterr().out
    assert "not fitted: model.layers.0.block_sparse_moe.experts." in shown and " tokens came to it\n" in shown
    saved_family("mixtral", tmp_path / "large", num_hidden_layers=1, num_local_experts=48)
    prune(tmp_path / "large", *WANDA, name="sparse")
    shown = capsys.readouterr().out
    assert "not by wanda: model.layers.0.block_sparse_moe.experts." in shown


@pytest.mark.parametrize("flags", [[*SIZES, "--hidden", "24"], WANDA])
def test_a_pruned_model_is_quantized_and_merged_like_any_other(
    flags: list[str], prune: Prune, full: Full, tmp_path: Path
) -> None:
    _, folder = full("llama")
    out = prune(folder, *flags)
    four, twice = tmp_path / "four", tmp_path / "twice"
    assert run(["quantize", str(out), "-m", "rtn", "-g", "8", "-b", "8", "-o", str(four), "--quiet"]) == 0
    assert (
        run(["merge", str(out), str(out), "-m", "linear", "-w", "0.5", "-w", "0.5", "-o", str(twice), "--quiet"]) == 0
    )
    before, after = load_file(out / "model.safetensors"), load_file(twice / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.allclose(after[name], before[name]) for name in before)
    ids = torch.arange(3, 20)[None]
    with quiet(), torch.no_grad():
        exact = AutoModelForCausalLM.from_pretrained(out)(input_ids=ids).logits
        near = AutoModelForCausalLM.from_pretrained(four, dtype=torch.float32)(input_ids=ids).logits
    assert (near - exact).norm() < 0.1 * exact.norm()


def test_a_weight_that_is_not_finite_is_named_and_nothing_is_left(
    full: Full, text: Path, tmp_path: Path, capsys: Shown
) -> None:
    _, folder = full("llama")
    source = tmp_path / "broken"
    shutil.copytree(folder, source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 5] = float("nan")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    magnitude, svd = ["-m", "magnitude", "--sparsity", "0.5"], ["-m", "svd", "--rank-ratio", "0.5"]
    for number, flags in enumerate((WANDA, magnitude, svd, SIZES)):
        out = tmp_path / f"out{number}"
        capsys.readouterr()
        assert run(["prune", str(source), *flags, "--calib", str(text), *WALK, "-o", str(out), "-q"]) == 5, flags
        assert "model.layers.1.mlp.down_proj.weight' has nan at element 5" in capsys.readouterr().err
        assert not out.exists()
