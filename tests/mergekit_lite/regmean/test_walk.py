"""RegMean and RegMean++ on tiny models, against what transformers' own forward feeds their linears."""

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from families import family
from killing import contents
from safetensors.torch import load_file
from tiny_models import saved, tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from wtool.cli import run
from wtool.writer import Writer, work_folder

WEIGHT = (0.4, 1.1)
WALK = ["--samples", "6", "--seqlen", "40"]
Models = Callable[..., list[Path]]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One text for each model, of exactly as many tokens as a few windows have."""
    folder = tmp_path_factory.mktemp("text")
    found = []
    for number, name in enumerate(("class", "import")):
        ids = tokenizer()(topics[name], add_special_tokens=False)["input_ids"][: 6 * 40]
        found.append(folder / f"{number}.jsonl")
        rows = [ids[begin : begin + 40] for begin in range(0, len(ids), 40)]
        found[-1].write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Two models of a family, tuned from one random model, in float32 or bfloat16."""

    def make(name: str, *, short: bool = False, **settings: Any) -> list[Path]:
        folder = tmp_path_factory.mktemp(name)
        found = []
        for number in range(2):
            model = family(name, **settings)
            torch.manual_seed(number + 1)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
            found.append(saved(model.bfloat16() if short else model, folder / str(number)))
        return found

    return make


def merge(models: Sequence[Path], texts: Sequence[Path], out: Path, *flags: str) -> Path:
    calibration = [part for text in texts for part in ("--calib", str(text))] + (WALK if texts else [])
    weights = ["-w", str(WEIGHT[0]), "-w", str(WEIGHT[1])]
    assert run(["merge", *map(str, models), *flags, *weights, *calibration, "-o", str(out), "--quiet"]) == 0
    return out


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "wtool.json").read_bytes())["report"]


def loaded(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def rows_of(text: Path) -> Tensor:
    return torch.tensor([json.loads(line)["input_ids"] for line in text.read_text().splitlines()])


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def layers_of(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    return next((name, each) for name, each in model.named_modules() if isinstance(each, nn.ModuleList))


def inputs_of(model: PreTrainedModel, layer: int, ids: Tensor) -> dict[str, Tensor]:
    """What the linears of a layer are fed, [tokens, in], by their modules' names."""
    found: dict[str, Tensor] = {}
    name, layers = layers_of(model)
    hooks = [
        module.register_forward_pre_hook(
            lambda _, fed, key=f"{name}.{layer}.{part}": found.update({key: fed[0].reshape(-1, fed[0].shape[-1])})
        )
        for part, module in layers[layer].named_modules()
        if is_linear(module)
    ]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def solved(inputs: Sequence[Tensor], matrices: Sequence[Tensor], alpha: float, damping: float) -> Tensor:
    """The paper's formula, in float64 with an inverse; matrices as [in, out]."""
    grams = [rows.T @ rows / len(rows) * factor for rows, factor in zip(inputs, WEIGHT, strict=True)]
    extra = damping * (sum(grams).diagonal().mean() / sum(WEIGHT))  # pyright: ignore[reportAttributeAccessIssue]
    damped = [
        gram * alpha + torch.diag((1 - alpha) * gram.diagonal() + factor * extra)
        for gram, factor in zip(grams, WEIGHT, strict=True)
    ]
    right = sum(gram @ matrix for gram, matrix in zip(damped, matrices, strict=True))
    return torch.linalg.inv(sum(damped)) @ right  # pyright: ignore[reportArgumentType]


def averaged(found: Sequence[PreTrainedModel]) -> PreTrainedModel:
    mean = deepcopy(found[0])
    with torch.no_grad():
        for own, *parts in zip(mean.parameters(), *(each.parameters() for each in found), strict=True):
            own.copy_(sum(w * part for w, part in zip(WEIGHT, parts, strict=True)) / sum(WEIGHT))
    return mean


def expected(folders: Sequence[Path], texts: Sequence[Path], alpha: float, damping: float, plus: bool) -> Any:
    """The merged model, layer by layer: for ++ a model's layer is put into what is merged so far, and fed by that."""
    own = [loaded(folder) for folder in folders]
    merged = averaged(own)
    for layer in range(len(layers_of(merged)[1])):
        inputs = []
        for model, text in zip(own, texts, strict=True):
            runner = model
            if plus:
                runner = deepcopy(merged)
                layers_of(runner)[1][layer] = deepcopy(layers_of(model)[1][layer])
            inputs.append(inputs_of(runner, layer, rows_of(text)))
        for name in inputs[0]:
            modules = [model.get_submodule(name) for model in own]
            turned = [m.weight if isinstance(m, Conv1D) else m.weight.T for m in modules]
            found = solved([each[name] for each in inputs], turned, alpha, damping)  # pyright: ignore
            target = merged.get_submodule(name)
            with torch.no_grad():
                target.weight.copy_(found if isinstance(target, Conv1D) else found.T)  # pyright: ignore
    return merged


@pytest.mark.parametrize("method", ["regmean", "regmean++"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_the_definition(name: str, method: str, models: Models, texts: list[Path], tmp_path: Path) -> None:
    folders = models(name)
    out = merge(folders, texts, tmp_path / "out", "-m", method, "-p", "alpha=0.8", "-p", "damping=0.01")
    wanted = dict(expected(folders, texts, 0.8, 0.01, method == "regmean++").named_parameters())
    found = loaded(out)
    moved = 0
    mean = dict(averaged([loaded(folder) for folder in folders]).named_parameters())
    for key, tensor in found.named_parameters():
        torch.testing.assert_close(
            tensor, wanted[key], rtol=1e-3, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}"
        )
        moved += not torch.allclose(wanted[key], mean[key], rtol=0, atol=1e-2)
    assert moved == len(report(out))  # every linear, and nothing else, is somewhere else than the mean


@pytest.mark.parametrize("method", ["regmean", "regmean++"])
def test_with_alpha_one_every_objective_is_at_most_that_of_the_mean(
    method: str, models: Models, texts: list[Path], tmp_path: Path
) -> None:
    out = merge(models("llama"), texts, tmp_path / "out", "-m", method, "-p", "alpha=1")
    found = [entry["objective"] for entry in report(out).values()]
    assert len(found) == 14 and max(found) <= 1 + 1e-6 and min(found) < 0.9


def test_the_second_pass_changes_what_comes_after_the_first_layer(
    models: Models, texts: list[Path], tmp_path: Path
) -> None:
    folders = models("llama")
    one = weights(merge(folders, texts, tmp_path / "one", "-m", "regmean"))
    two = weights(merge(folders, texts, tmp_path / "two", "-m", "regmean++"))
    name = "model.layers.1.mlp.up_proj.weight"
    assert one.keys() == two.keys() and not torch.allclose(one[name], two[name], rtol=0, atol=1e-3)
    assert torch.equal(one["model.norm.weight"], two["model.norm.weight"])


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_statistics_give_what_the_text_gives(name: str, models: Models, texts: list[Path], tmp_path: Path) -> None:
    folders = models(name)
    stats = []
    for folder, text in zip(folders, texts, strict=True):
        stats += ["--stats", str(tmp_path / f"stats{len(stats)}")]
        assert run(["calibrate", str(folder), "--calib", str(text), *WALK, "-o", stats[-1], "--quiet"]) == 0
    one = merge(folders, texts, tmp_path / "text", "-m", "regmean")
    other = merge(folders, [], tmp_path / "stats", "-m", "regmean", *stats)
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert report(one) == report(other)


@pytest.mark.parametrize("method", ["regmean", "regmean++"])
def test_experts_that_no_token_came_to_are_averaged(method: str, models: Models, tmp_path: Path) -> None:
    folders = models("qwen3_moe", num_experts=12)
    text = tmp_path / "few.jsonl"
    text.write_text(json.dumps({"input_ids": [5, 9]}) + "\n")
    out = merge(folders, [text], tmp_path / "out", "-m", method)
    told, merged = report(out), weights(out)
    own = [weights(folder) for folder in folders]
    unseen = [name for name, entry in told.items() if "fallback" in entry]
    seen = [name for name in told if ".experts." in name and name not in unseen]
    assert unseen and seen and all(".experts." in name for name in unseen)
    for name in unseen:
        mean = sum(w * model[f"{name}.weight"].double() for w, model in zip(WEIGHT, own, strict=True)) / sum(WEIGHT)
        torch.testing.assert_close(merged[f"{name}.weight"].double(), mean, rtol=0, atol=1e-6)


def test_routers_embeddings_norms_and_head_are_averaged(models: Models, texts: list[Path], tmp_path: Path) -> None:
    folders = models("qwen3_moe")
    out = merge(folders, texts, tmp_path / "out", "-m", "regmean")
    assert run(["merge", *map(str, folders), "-w", "0.4", "-w", "1.1", "-o", str(tmp_path / "mean"), "-q"]) == 0
    merged, mean = weights(out), weights(tmp_path / "mean")
    same = {name for name in merged if torch.equal(merged[name], mean[name])}
    assert same == {name for name in merged if name.removesuffix(".weight") not in report(out)}
    assert {"model.embed_tokens.weight", "model.layers.0.mlp.gate.weight", "model.norm.weight"} <= same


@pytest.mark.parametrize("method", ["regmean", "regmean++"])
def test_a_model_with_itself_is_itself(method: str, models: Models, texts: list[Path], tmp_path: Path) -> None:
    first, _ = models("llama", short=True)
    for copies in ([first], [first, first]):
        out = tmp_path / f"out{len(copies)}"
        arguments = ["merge", *map(str, copies), "-m", method, "--calib", str(texts[0]), *WALK, "-o", str(out), "-q"]
        assert run(arguments) == 0
        merged, own = weights(out), weights(first)
        assert merged.keys() == own.keys() and all(torch.equal(merged[key], own[key]) for key in own)


class Stopped(BaseException):
    """As if the process were killed."""


@pytest.mark.parametrize("method", ["regmean", "regmean++"])
@pytest.mark.parametrize("moment", [3, 9, 16])  # among the other tensors, inside of the first block and of the second
def test_a_walk_that_was_stopped_goes_on(
    method: str, moment: int, models: Models, texts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = models("llama", short=True)
    straight = merge(folders, texts, tmp_path / "straight", "-m", method)
    write, out = Writer.note_done, tmp_path / "out"
    left = [moment]

    def some(self: Writer, *args: Any, **named: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Stopped
        write(self, *args, **named)

    with monkeypatch.context() as patched:
        patched.setattr(Writer, "note_done", some)
        with pytest.raises(Stopped):
            merge(folders, texts, out, "-m", method)
    assert (work_folder(out) / "journal").read_bytes().count(b"\n") == moment + 1
    merge(folders, texts, out, "-m", method)
    assert contents(out) == contents(straight)
