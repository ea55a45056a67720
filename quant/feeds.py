"""What feeds what in a block: the operation whose output channels are, one by one, the inputs of some matrices.

If inputs of a matrix are to be divided by a scale, and the operation before puts out channels that can be divided
instead (the weight of a norm, the rows of another matrix), it costs nothing. Which operation that is, is found by
experiment, so that no architecture is listed: a batch goes through the block with some output channels of one operation
multiplied by powers of two, which every float type does exactly. A matrix whose input comes multiplied likewise is fed
by them, and is given what it was given before. If in the end the block puts out what it put out before, these
matrices are all that the channels feed. So a norm that feeds a router and experts is found to do so, a value that goes
to several query heads is found in each, an up projection reaches down through the gate's product, and where a nonlinear
function, another norm or the residual stream stands between, nothing is found.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import Module
from torch.overrides import TorchFunctionMode

from wtool.block_pass import WATCHED, Forward

_BASE = 4  # channels are told apart by factors 2, 4, 8, 16 in one run after the other
_EXACT = 0.99  # share of values that must come out as they were, to the bit; not all, as a GPU may add in any order

_COPIES = (Tensor.to, Tensor.type, Tensor.float)  # routers are computed with in a wider type
Kind = Literal["norm", "norm of 1 + weight", "rows"]


@dataclass(frozen=True)
class Feed:
    """An operation and the matrices it feeds. Parameters go by their names in the block."""

    kind: Kind
    parameter: str
    begin: int  # the first of its output channels; those after it, to the last, are meant
    channels: int
    takers: Mapping[str, Tensor | None]  # parameter -> the channel that each input is; None where they are the same


class _Elsewhere(Exception):
    """Ends a run: a matrix's input changed in a way that no scale can make up for."""


Meet = Callable[[str, int, Tensor], Tensor]
Leave = Callable[[str, Tensor], Tensor]


class _Products(TorchFunctionMode):
    """Has a say in every product with a parameter of the block."""

    def __init__(self, parameters: Mapping[str, Tensor], meet: Meet, leave: Leave = lambda name, result: result):
        super().__init__()
        self._spans = [(p.data_ptr(), p.data_ptr() + p.nbytes, name) for name, p in parameters.items()]
        self._meet, self._leave = meet, leave
        self._count, self._copies = 0, list[Tensor]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _COPIES and (name := self._name(args[0])):
            copy = func(*args, **kwargs)
            self._spans.append((copy.data_ptr(), copy.data_ptr() + copy.nbytes, name))
            self._copies.append(copy)  # held, so that nothing else is at its place
            return copy
        if func not in WATCHED:
            return func(*args, **kwargs)
        (place, key), (weight_place, weight_key) = WATCHED[func]
        weight = args[weight_place] if weight_place < len(args) else kwargs[weight_key]
        name = self._name(weight)
        if name is None:
            return func(*args, **kwargs)
        fed = args[place] if place < len(args) else kwargs[key]
        given = self._meet(name, self._count, fed)
        self._count += 1
        if place < len(args):
            args = (*args[:place], given, *args[place + 1 :])
        else:
            kwargs = {**kwargs, key: given}
        return self._leave(name, func(*args, **kwargs))

    def _name(self, weight: Any) -> str | None:
        begin = weight.data_ptr() if isinstance(weight, Tensor) else -1
        return next((name for first, last, name in self._spans if first <= begin < last), None)


@dataclass
class _Trial:
    """A block and one batch, to be run again and again."""

    forward: Forward

    def __post_init__(self) -> None:
        module = self.forward.block.module
        self.parameters = {name: parameter.data for name, parameter in module.named_parameters()}
        self.inputs: list[tuple[str, Tensor]] = []  # of the products, in their order
        self.widths: dict[str, int] = {}  # parameter -> outputs

        def meet(name: str, number: int, fed: Tensor) -> Tensor:
            self.inputs.append((name, fed.clone()))
            return fed

        def leave(name: str, result: Tensor) -> Tensor:
            self.widths[name] = result.shape[-1]
            return result

        with _Products(self.parameters, meet, leave):
            self.output = self.forward.run(0)
        self.features = {name: fed.shape[-1] for name, fed in self.inputs}

    def unmet(self) -> set[int]:
        """Numbers of inputs of matrices that the batch did not come to."""
        prefix = f"{self.forward.block.name}."
        linears = self.forward.block.linears
        return {each.shape[1] for each in linears if each.slot.parameter.removeprefix(prefix) not in self.features}

    def exponents(self, changed: Tensor, before: Tensor) -> Tensor:
        """By what powers of two the features of an input were multiplied; NaN where they were all 0."""
        rows = before.reshape(-1, before.shape[-1]).float()
        sums = changed.reshape(rows.shape).float().abs().sum(0) / rows.abs().sum(0)
        found = sums.log2().round()
        factors = torch.exp2(found.nan_to_num(0)).to(before.dtype)
        if not _same(changed / factors, before):
            raise _Elsewhere
        return found

    def run(self, source: "_Source", factors: Tensor) -> dict[str, Tensor]:
        """The powers of two that come to the matrices fed by a source with its channels multiplied.

        raises: _Elsewhere where that cannot be made up for at matrices
        """
        found: dict[str, Tensor] = {}

        def meet(name: str, number: int, fed: Tensor) -> Tensor:
            if number >= len(self.inputs) or self.inputs[number][0] != name:
                raise _Elsewhere
            before = self.inputs[number][1]
            if fed.shape != before.shape:
                raise _Elsewhere
            if torch.equal(fed, before):
                return fed
            powers = self.exponents(fed, before)
            known = found.setdefault(name, powers)
            found[name] = torch.where(known.isnan(), powers, known)
            return before

        def leave(name: str, result: Tensor) -> Tensor:
            return source.multiplied(result, factors) if name == source.parameter else result

        with source.hooked(self.forward.block.module, factors), _Products(self.parameters, meet, leave):
            output = self.forward.run(0)
        if not _same(output, self.output):
            raise _Elsewhere
        return found


@dataclass(frozen=True)
class _Source:
    """Output channels of an operation."""

    parameter: str
    begin: int
    channels: int
    module: str | None = None  # of a norm; a product is met where it is computed

    def multiplied(self, result: Tensor, factors: Tensor) -> Tensor:
        whole = torch.ones(result.shape[-1], dtype=result.dtype, device=result.device)
        whole[self.begin :] = factors.to(result.dtype)
        return result * whole

    @contextmanager
    def hooked(self, block: Module, factors: Tensor) -> Iterator[None]:
        if self.module is None:
            yield
            return
        hook = block.get_submodule(self.module).register_forward_hook(
            lambda module, arguments, result: self.multiplied(result, factors)  # pyright: ignore[reportArgumentType]
        )
        try:
            yield
        finally:
            hook.remove()


def feeds(forward: Forward) -> list[Feed]:
    """Find what feeds the matrices of a filled block; every matrix is in one feed at most."""
    trial = _Trial(forward)
    unmet, taken = trial.unmet(), set[str]()
    found: list[Feed] = []
    for source in [*_norms(trial), *_rows(trial)]:
        if source.channels in unmet or any(feed.parameter == source.parameter for feed in found):
            continue
        try:
            takers = _takers(trial, source)
            kind = _kind(trial, source)
        except _Elsewhere:
            continue
        if takers and not taken & takers.keys():
            found.append(Feed(kind, source.parameter, source.begin, source.channels, takers))
            taken |= takers.keys()
    return found


def _norms(trial: _Trial) -> Iterator[_Source]:
    for name, module in trial.forward.block.module.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.ndim == 1 and name:
            yield _Source(f"{name}.weight", 0, len(weight), name)


def _rows(trial: _Trial) -> Iterator[_Source]:
    """Outputs of matrices: all, and of matrices that hold several (queries, keys and values; gate and up) the last.

    As many as another matrix has inputs, or as its query heads have key heads.
    """
    config = trial.forward.network.model.config
    heads, kept = getattr(config, "num_attention_heads", 1) or 1, getattr(config, "num_key_value_heads", 1) or 1
    shares = {1, heads // kept} if heads % kept == 0 else {1}
    counts = {features // share for features in trial.features.values() for share in shares if features % share == 0}
    for name, width in trial.widths.items():
        for count in sorted((count for count in counts if count <= width), reverse=True):
            yield _Source(name, width - count, count)


def _takers(trial: _Trial, source: _Source) -> dict[str, Tensor | None]:
    """The matrices that a source feeds, and the channel that each input is."""
    channel = torch.arange(source.channels, device=trial.forward.network.device)
    numbers: dict[str, Tensor] = {}
    place = 1
    while place == 1 or place < source.channels:
        met = trial.run(source, torch.exp2(channel // place % _BASE + 1.0))
        if place > 1 and met.keys() != numbers.keys():
            raise _Elsewhere
        for name, powers in met.items():
            if bool(((powers < 1) | (powers > _BASE)).any()):
                raise _Elsewhere
            numbers[name] = numbers.get(name, 0) + (powers - 1) * place
        place *= _BASE
    return {name: _map(found, channel) for name, found in numbers.items()}


def _map(found: Tensor, channel: Tensor) -> Tensor | None:
    """The channel of every input; None where it is the same. Inputs that were always 0 leave it open."""
    dead = found.isnan()
    if len(found) == len(channel) and bool((dead | (found == channel)).all()):
        return None
    if bool(dead.any()) or bool((found >= len(channel)).any()):
        raise _Elsewhere
    return found.long()


def _kind(trial: _Trial, source: _Source) -> Kind:
    """How a source's channels are multiplied by its parameter: for norms, seen by trying."""
    if source.module is None:
        return "rows"
    module = trial.forward.block.module.get_submodule(source.module)
    own = {name: parameter.data.float() for name, parameter in module.named_parameters()}
    device = own["weight"].device
    fed = torch.linspace(-1, 1, 2 * source.channels, device=device).view(2, -1)
    factors = torch.linspace(0.5, 2, source.channels, device=device)
    right = functional_call(module, own, (fed,)) * factors
    moved = {"bias": own["bias"] * factors} if "bias" in own else {}
    kinds: list[tuple[Kind, int]] = [("norm", 0), ("norm of 1 + weight", 1)]
    for kind, offset in kinds:
        changed = functional_call(module, {"weight": (own["weight"] + offset) * factors - offset, **moved}, (fed,))
        if torch.allclose(changed, right, rtol=1e-4, atol=1e-4):
            return kind
    raise _Elsewhere


def _same(changed: Tensor, before: Tensor) -> bool:
    return changed.shape == before.shape and float((changed == before).float().mean()) >= _EXACT
