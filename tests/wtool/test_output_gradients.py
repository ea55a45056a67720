"""Mean squared gradients by the outputs of linears, against back-propagation through the whole model."""

from pathlib import Path

import pytest
import torch
from families import saved_family
from tiny_models import llama, saved
from torch import Tensor
from transformers import PreTrainedModel

from wtool import output_gradients
from wtool.calibrate import Where
from wtool.checkpoint import open_checkpoint
from wtool.network import Network
from wtool.output_gradients import squared_gradients


def windows(count: int = 3, length: int = 12) -> list[Tensor]:
    return list(torch.randint(3, 300, (count, length), generator=torch.Generator().manual_seed(7)))


def whole(model: PreTrainedModel, texts: list[Tensor], drawn: Tensor) -> dict[str, Tensor]:
    """The same by one backward through the model; drawn: the tokens at each position, in order."""
    sums: dict[str, Tensor] = {}
    energies: dict[str, Tensor] = {}

    def gather(name: str) -> object:
        def hook(module: object, arguments: tuple[Tensor], output: Tensor) -> None:
            lengths = arguments[0].detach().double().square().sum(-1, keepdim=True)
            energies[name] = lengths.sum()
            output.register_hook(lambda gradient: add(name, lengths, gradient))

        return hook

    def add(name: str, lengths: Tensor, gradient: Tensor) -> None:
        sums[name] = (lengths * gradient.double().square()).sum((0, 1))

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            module.register_forward_hook(gather(name))  # pyright: ignore[reportArgumentType]
    logits = model(input_ids=torch.stack(texts)).logits.log_softmax(-1).flatten(0, 1)
    logits.gather(-1, drawn[:, None]).sum().backward()
    return {name: total / energies[name] for name, total in sums.items()}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The tokens that are drawn, as they are."""
    found: list[Tensor] = []
    real = torch.searchsorted

    def kept(*args: Tensor) -> Tensor:
        found.append(real(*args)[:, 0])
        return real(*args)

    monkeypatch.setattr(output_gradients.torch, "searchsorted", kept)
    return found


def test_it_is_what_one_backward_through_the_model_gives(tmp_path: Path, drawn: list[Tensor]) -> None:
    model = llama(num_hidden_layers=3, initializer_range=0.2)
    source = open_checkpoint(str(saved(model, tmp_path / "model")))
    texts = windows()
    found = squared_gradients(Network(source, dtype="F32"), texts)
    expected = whole(model, texts, torch.cat(drawn))
    assert found.keys() == {f"{name}.weight" for name in expected}
    for name, value in expected.items():
        torch.testing.assert_close(found[f"{name}.weight"], value.float(), rtol=1e-3, atol=1e-9)


def test_where_states_wait_and_how_many_windows_run_together_does_not_matter(tmp_path: Path) -> None:
    source = open_checkpoint(str(saved(llama(num_hidden_layers=2, initializer_range=0.2), tmp_path / "model")))
    places = [Where(), Where(activations="disk"), Where(activations="cpu", batch_tokens=12)]
    found = [squared_gradients(Network(source, dtype="F32"), windows(), where=where) for where in places]
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=0)
        torch.testing.assert_close(found[2][name], value, rtol=1e-3, atol=1e-9)  # in another order


@pytest.mark.parametrize("family", ["mixtral", "gpt2", "phi3"])
def test_families_whose_linears_are_fused_or_turned(family: str, tmp_path: Path) -> None:
    source_folder = tmp_path / "model"
    saved_family(family, source_folder)
    network = Network(open_checkpoint(str(source_folder)), dtype="F32")
    found = squared_gradients(network, windows())
    shapes = {linear.name: linear.shape for block in network.blocks for linear in block.linears}
    assert found and found.keys() <= shapes.keys()
    assert all(value.shape == (shapes[name][0],) and bool((value >= 0).all()) for name, value in found.items())
    assert any(bool((value > 0).any()) for value in found.values())


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    chances = torch.tensor([0.5, 0.25, 0.0, 0.25])
    logits = chances.log().expand(1, 20_000, 4).clone()
    with torch.enable_grad():
        logits.requires_grad_()
        score = output_gradients._score(logits, torch.Generator().manual_seed(0))
    score.backward()
    assert logits.grad is not None
    counts = (logits.grad[0] > 0).float().mean(0)  # one minus the chance where a token was drawn, minus it elsewhere
    torch.testing.assert_close(counts, chances, atol=0.02, rtol=0)
