"""The sequential way through a block: all batches side by side, stopped before linears that are yet to be changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from greenlet import getcurrent, greenlet
from torch import Tensor

from wtool.block_pass import Forward, Gathered, Sites, finish
from wtool.network import Linear


def sequential(forward: Forward, sites: Sites, before: Forward | None = None) -> None:
    """Take all batches through a block, changing its linears on the way.

    before: the same block on what the batches were before anything was changed; it goes through the linears as they
            were, always one stop ahead, and statistics are of pairs of inputs
    """
    shared = sites.of(forward, forward.regions())
    released: set[Linear] = set()
    flows = [_Flow(forward, number) for number in range(len(forward.calls))]
    old = [_Flow(before, number) for number in range(len(before.calls))] if before else []
    with _stops(forward, released):
        try:
            _advance(old)
            while flows[0].advance():
                gathered = Gathered(forward, shared)
                for number, flow in enumerate(flows):
                    if number:
                        _advance([flow], more=True)
                    if old:
                        gathered.add_pair(*flow.met(), old[number].met()[1])
                    else:
                        gathered.add(*flow.met())
                met = next(iter(gathered.found))
                released.update(met)
                _advance(old)
                for site in gathered.sites():
                    forward.visit(site)
            _advance(flows[1:], more=False)
        finally:
            for flow in (*flows, *old):
                flow.abandon()
    _keep_outputs(flows, forward)
    if before:
        _keep_outputs(old, before)
    finish(forward, released)


def _keep_outputs(flows: Sequence[_Flow], forward: Forward) -> None:
    for number, flow in enumerate(flows):
        forward.hidden[number] = flow.output()
        forward.progress(1)


def _advance(flows: Sequence[_Flow], more: bool | None = None) -> None:
    """Take flows to their next linears, or, as all alike, to the block's end."""
    for flow in flows:
        found = flow.advance()
        assert more in (None, found), "batches of one block go through the same linears"
        more = found


class _Flow:
    """A batch on its way through a block, stopped before every linear that is not released yet.

    A greenlet is what can be stopped in the middle of a forward. All are of one thread, which runs one at a time.
    """

    def __init__(self, forward: Forward, number: int):
        self._greenlet = greenlet(lambda: forward.run(number, last=True))
        self._got: Any = None

    def advance(self) -> bool:
        """Go on to the next linears; whether there are any before the block's end."""
        self._got = None
        self._got = self._greenlet.switch()
        return not self._greenlet.dead

    def met(self) -> tuple[tuple[Linear, ...], Tensor]:
        """The linears it stands before, and what they are fed."""
        return self._got

    def output(self) -> Tensor:
        """The block's output, handed out once."""
        output, self._got = self._got, None
        return output

    def abandon(self) -> None:
        """End it where it stands, if it has not come to its end."""
        self._greenlet.throw()


@contextmanager
def _stops(forward: Forward, released: set[Linear]) -> Iterator[None]:
    """Have the flows stop before linears that are not released, for a while."""
    network = forward.network
    modules: dict[str, tuple[Linear, ...]] = {}
    for linear in forward.block.linears:
        path = linear.slot.parameter.rpartition(".")[0]
        modules[path] = (*modules.get(path, ()), linear)

    def stop(linears: tuple[Linear, ...], arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        if linears[0] not in released:
            walk = getcurrent().parent
            assert walk is not None, "a flow is started by the walk"
            walk.switch((linears, arguments[0] if arguments else named["input"]))

    hooks = [
        network.model.get_submodule(path).register_forward_pre_hook(
            lambda module, arguments, named, linears=linears: stop(linears, arguments, named), with_kwargs=True
        )
        for path, linears in modules.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
