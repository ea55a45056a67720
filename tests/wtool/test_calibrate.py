"""The walk: what is gathered is what transformers' own model feeds its linears, whatever the way and the batches."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from families import FAMILIES, family, saved_family
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from wtool.calibrate import Place, Site, Visitor, Way, Where, walk
from wtool.checkpoint import open_checkpoint
from wtool.network import Block, Linear, Network, Read
from wtool.statistics import CrossGram, Gram

torch.manual_seed(0)
WINDOWS = [torch.randint(3, 300, (12,)) for _ in range(5)] + [torch.randint(3, 300, (7,)) for _ in range(2)]
TOKENS = sum(map(len, WINDOWS))
WAYS: tuple[Way, ...] = ("observe", "one-pass", "sequential")


class Gathering(Visitor[Gram]):
    """A visitor that keeps everything, and changes what it is told to."""

    def __init__(self, factor: float = 1.0, finished: int = 0):
        self.factor, self.finished = factor, finished
        self.grams: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}
        self.sites: list[list[str]] = []
        self.unseen: list[str] = []
        self.weights: dict[str, Tensor] = {}
        self.network: Network | None = None

    def written(self, block: Block) -> Read | None:
        if block.index >= self.finished:
            return None
        assert self.network is not None
        names = {linear.name for linear in block.linears}
        read = self.network.read
        return lambda name: read(name) * (self.factor if name in names else 1)

    def gather(self, linears: tuple[Linear, ...], features: int, device: torch.device) -> Gram:
        return Gram(features, device)

    def site(self, site: Site[Gram]) -> Mapping[Linear, Tensor]:
        self.sites.append([linear.name for linear in site.linears])
        total = site.gathered.finish() * site.gathered.tokens
        for linear in site.linears:
            self.grams[linear.name] = total
            self.tokens[linear.name] = site.gathered.tokens
        if self.factor == 1:
            return {}
        assert self.network is not None
        return {linear: self.network.view(linear) * self.factor for linear in site.linears}

    def block(self, block: Block, unseen: Sequence[Linear]) -> Mapping[Linear, Tensor]:
        self.unseen += [linear.name for linear in unseen]
        if self.factor == 1:
            return {}
        assert self.network is not None
        return {linear: self.network.view(linear) * self.factor for linear in unseen}


def gather(folder: Path, way: Way, batch_tokens: int = 24, factor: float = 1.0, finished: int = 0) -> Gathering:
    network = Network(open_checkpoint(str(folder)), dtype="F32")
    visitor = Gathering(factor, finished)
    visitor.network = network
    walk(network, WINDOWS, visitor, way=way, where=Where(batch_tokens=batch_tokens))
    return visitor


class Pairing(Gathering):
    """One that keeps pairs of inputs."""

    def __init__(self, factor: float = 0.5, finished: int = 0):
        super().__init__(factor, finished)
        self.crosses: dict[str, Tensor] = {}

    def gather(self, linears: tuple[Linear, ...], features: int, device: torch.device) -> Gram:
        return CrossGram(features, device)

    def site(self, site: Site[Gram]) -> Mapping[Linear, Tensor]:
        assert isinstance(site.gathered, CrossGram)
        gram, cross = site.gathered.finish_both()
        assert self.network is not None
        for linear in site.linears:
            self.tokens[linear.name] = site.gathered.tokens
            self.grams[linear.name] = gram
            if cross is not None:
                self.crosses[linear.name] = cross
        return {linear: self.network.view(linear) * self.factor for linear in site.linears}


def paired(folder: Path, batch_tokens: int = 24, finished: int = 0, activations: Place = "device") -> Pairing:
    visitor = Pairing(finished=finished)
    visitor.network = network = Network(open_checkpoint(str(folder)), dtype="F32")
    walk(network, WINDOWS, visitor, way="asymmetric", where=Where(batch_tokens=batch_tokens, activations=activations))
    return visitor


def fed(model: PreTrainedModel) -> dict[str, Tensor]:
    """The sum of x xᵀ of every linear module of the model, in float64, by parameter."""
    return {name: inputs.T @ inputs for name, inputs in inputs_of(model).items()}


def inputs_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """What every linear module of the model is fed, float64 [tokens, features], by parameter."""
    inputs: dict[str, list[Tensor]] = {}

    def hook(name: str):
        def add(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            inputs.setdefault(name, []).append(arguments[0].reshape(-1, arguments[0].shape[-1]).double())

        return add

    hooks = [
        module.register_forward_pre_hook(hook(f"{name}.weight"))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]
    with torch.no_grad():
        for window in WINDOWS:
            model(input_ids=window[None])
    for each in hooks:
        each.remove()
    return {name: torch.cat(rows) for name, rows in inputs.items()}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_linear_is_fed_what_the_model_feeds_it(name: str, way: Way, tmp_path: Path) -> None:
    model = saved_family(name, tmp_path)
    expected = fed(model)
    network = Network(open_checkpoint(str(tmp_path)), dtype="F32")
    found = gather(tmp_path, way)
    compared = 0
    for block in network.blocks:
        for linear in block.linears:
            if linear.slot.expert is None:
                total = expected[linear.slot.parameter]
                assert found.tokens[linear.name] == TOKENS
                torch.testing.assert_close(
                    found.grams[linear.name].double(), total, rtol=0, atol=1e-5 * float(total.abs().max())
                )
                compared += 1
    assert compared >= 8


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_an_expert_is_fed_the_tokens_that_are_routed_to_it(name: str, tmp_path: Path) -> None:
    model = saved_family(name, tmp_path)
    expected: dict[tuple[str, int], Tensor] = {}

    def hook(path: str):
        def add(module: nn.Module, arguments: tuple[Tensor, Tensor, Tensor]) -> None:
            states, chosen, _ = arguments
            for token, experts in zip(states.double(), chosen, strict=True):
                for expert in experts.tolist():
                    key = (path, expert)
                    expected[key] = expected.get(key, 0) + token[:, None] * token[None]

        return add

    for path, module in model.named_modules():
        if path.endswith("experts") and hasattr(module, "gate_up_proj"):
            module.register_forward_pre_hook(hook(path))
    with torch.no_grad():
        for window in WINDOWS:
            model(input_ids=window[None])
    network = Network(open_checkpoint(str(tmp_path)), dtype="F32")
    found = gather(tmp_path, "one-pass")
    routed = 0
    for block in network.blocks:
        for linear in block.linears:
            path, _, leaf = linear.slot.parameter.rpartition(".")
            if linear.slot.expert is None or leaf != "gate_up_proj":
                continue
            total = expected.get((path, linear.slot.expert))
            if total is None:
                assert linear.name in found.unseen
            else:
                torch.testing.assert_close(found.grams[linear.name].double(), total, rtol=1e-4, atol=1e-3)
                routed += found.tokens[linear.name]
    moe_layers = len({path for path, _ in expected})
    assert routed == 2 * 2 * TOKENS * moe_layers  # two experts a token, gate and up


def test_linears_that_share_an_input_share_a_site(tmp_path: Path) -> None:
    saved_family("llama", tmp_path)
    kinds = [sorted(name.split(".")[-2] for name in site) for site in gather(tmp_path, "observe").sites]
    assert kinds == 2 * [["k_proj", "q_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "bert"])
def test_a_sequential_walk_feeds_each_linear_what_the_changed_ones_before_it_give(name: str, tmp_path: Path) -> None:
    model = saved_family(name, tmp_path)
    found = gather(tmp_path, "sequential", factor=0.5)
    linears = {
        linear.slot.parameter
        for block in Network(open_checkpoint(str(tmp_path)), dtype="F32").blocks
        for linear in block.linears
    }
    for parameter in linears:
        model.get_parameter(parameter).data.mul_(0.5)
    expected = fed(model)
    network = Network(open_checkpoint(str(tmp_path)), dtype="F32")
    for block in network.blocks:
        for linear in block.linears:
            total = expected[linear.slot.parameter]
            torch.testing.assert_close(
                found.grams[linear.name].double(), total, rtol=0, atol=1e-5 * float(total.abs().max())
            )


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "bert"])
def test_an_asymmetric_walk_pairs_inputs_with_those_of_the_model_as_it_was(name: str, tmp_path: Path) -> None:
    model = saved_family(name, tmp_path)
    found, before = paired(tmp_path), inputs_of(model)
    network = Network(open_checkpoint(str(tmp_path)), dtype="F32")
    linears = [linear for block in network.blocks for linear in block.linears]
    for parameter in {linear.slot.parameter for linear in linears}:
        model.get_parameter(parameter).data.mul_(0.5)
    after, moved = inputs_of(model), 0
    for linear in linears:
        now, then = after[linear.slot.parameter], before[linear.slot.parameter]
        size = float((now.T @ now).abs().max()) / TOKENS
        cross = (then - now).T @ now / TOKENS
        torch.testing.assert_close(found.grams[linear.name].double(), now.T @ now / TOKENS, rtol=0, atol=1e-5 * size)
        torch.testing.assert_close(found.crosses[linear.name].double(), cross, rtol=0, atol=2e-5 * size)
        assert found.tokens[linear.name] == TOKENS
        moved += float(cross.abs().max()) > 1e-2 * size
    assert moved > len(linears) // 2


def test_an_asymmetric_walk_that_goes_on_or_waits_elsewhere_is_the_same_to_the_bit(tmp_path: Path) -> None:
    for name in ("llama", "mixtral"):  # mixtral's blocks go in one pass
        folder = tmp_path / name
        saved_family(name, folder)
        whole, rest, disk = paired(folder), paired(folder, finished=1), paired(folder, activations="disk")
        assert 0 < len(rest.grams) < len(whole.grams) == len(disk.grams)
        for other in (rest, disk):
            for linear, gram in other.grams.items():
                assert torch.equal(gram, whole.grams[linear])
            assert all(torch.equal(cross, whole.crosses[linear]) for linear, cross in other.crosses.items())


def test_of_experts_an_asymmetric_walk_gathers_what_they_are_fed_now(tmp_path: Path) -> None:
    saved_family("mixtral", tmp_path)
    found, plain = paired(tmp_path), gather(tmp_path, "sequential", factor=0.5)
    assert not found.crosses
    for name, gram in found.grams.items():
        torch.testing.assert_close(gram * found.tokens[name], plain.grams[name])


def test_a_walk_in_one_pass_feeds_a_block_what_the_changed_blocks_before_it_give(tmp_path: Path) -> None:
    model = saved_family("mixtral", tmp_path)
    found = gather(tmp_path, "one-pass", factor=0.5)
    for name, parameter in model.named_parameters():
        if "layers.0." in name and parameter.ndim > 1 and "mlp.gate." not in name:
            parameter.data.mul_(0.5)
    expected = fed(model)["model.layers.1.self_attn.q_proj.weight"]
    torch.testing.assert_close(
        found.grams["model.layers.1.self_attn.q_proj.weight"].double(), expected, rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("batch_tokens", [1, 36, 1000])
def test_batches_change_nothing_but_rounding(way: Way, batch_tokens: int, tmp_path: Path) -> None:
    saved_family("qwen3", tmp_path)
    ours, other = gather(tmp_path, way), gather(tmp_path, way, batch_tokens)
    for name, gram in ours.grams.items():
        torch.testing.assert_close(other.grams[name], gram, rtol=0, atol=1e-5 * float(gram.abs().max()))


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_a_walk_that_goes_on_is_the_same_to_the_bit(name: str, tmp_path: Path) -> None:
    saved_family(name, tmp_path)
    whole, rest = gather(tmp_path, "sequential", factor=0.5), gather(tmp_path, "sequential", factor=0.5, finished=1)
    assert len(rest.sites) == len(whole.sites) // 2
    for name, gram in rest.grams.items():
        assert torch.equal(gram, whole.grams[name])


@pytest.mark.parametrize("activations", ["cpu", "disk"])
def test_activations_may_wait_anywhere(activations: Place, tmp_path: Path) -> None:
    saved_family("llama", tmp_path)
    network = Network(open_checkpoint(str(tmp_path)), dtype="F32")
    visitor, asked, told = Gathering(), [], []

    def start(steps: int):
        asked.append(steps)
        return told.append

    walk(network, WINDOWS, visitor, where=Where(activations=activations, batch_tokens=24), start=start)
    expected = gather(tmp_path, "sequential")
    assert all(torch.equal(gram, expected.grams[name]) for name, gram in visitor.grams.items())
    assert asked == [sum(told)]


def test_an_error_in_a_visitor_ends_the_walk_and_its_threads(tmp_path: Path) -> None:
    import threading

    class Failing(Gathering):
        def site(self, site: Site[Gram]) -> Mapping[Linear, Tensor]:
            raise ValueError("no")

    saved_family("llama", tmp_path)
    before = threading.active_count()
    with pytest.raises(ValueError, match="no"):
        walk(Network(open_checkpoint(str(tmp_path)), dtype="F32"), WINDOWS, Failing())
    assert threading.active_count() == before


def test_an_expert_that_no_token_comes_to_is_told(tmp_path: Path) -> None:
    from tiny_models import saved

    model = family("mixtral", num_local_experts=32)
    saved(model, tmp_path)
    found = gather(tmp_path, "sequential")
    routed = {name for name in found.grams if "experts" in name}
    assert found.unseen and routed
    assert len(routed) + len(found.unseen) == 2 * 32 * 3
