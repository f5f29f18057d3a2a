"""Fully sharded parameters come and go: what stage 3 of ZeRO does beside stage 2.   Zhao et al. 2023 (2304.11277, FSDP)

Idea      A parameter is needed only while its layer computes, forward and again backward. So each layer is gathered
          from the ranks before, and freed after; the next one is on its way meanwhile. What autograd saves would keep
          the weights alive: so of a weight it saves where it was, and asking for it, backward says what to gather.
Formula   in the order of time, "rest" being the embedding, the last norm and the head:
          forward    rest | block 1 | block 2 | ... | block L | rest
          backward   rest | block L | ... | block 2 | block 1               the embedding's backward needs no weights
          gathered at any time: the one that computes and the next; the last is not freed between the two
Shapes    a unit's flats (P, C), of which this rank has one row; views of the parameters' own shapes
Omits     a communication stream's priorities; CPU-side rate limits; two units in flight.
Run       python gathering.py    the order in which a GPT's units come; ends with "units there at once: ..."
Test      pytest tests/test_zero.py
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn as nn
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


# --- 1. models that never exist whole -----------------------------------------------------------------

@torch.no_grad()
def materialise(p: nn.Parameter, device: torch.device) -> None:
    """Put a meta parameter on a device, with its shape and no memory: the same object, its hooks and attributes."""
    real = nn.Parameter(torch.zeros((), dtype=p.dtype, device=device).expand(p.shape), p.requires_grad)
    hooks, attributes = list((p._backward_hooks or {}).values()), dict(p.__dict__)
    torch.utils.swap_tensors(p, real)
    p.__dict__.update(attributes)
    for hook in hooks:
        p.register_hook(hook)


@torch.no_grad()
def draw_values(model: nn.Module, dtypes: list[torch.dtype], keep: Callable[[nn.Parameter, Tensor], None],
                initialise: Callable[[nn.Module], None]) -> list[str]:
    """Let ``initialise`` walk over parameters that have values only while it looks at them: then ``keep(p, values)``
    takes what this rank owns. They are on the CPU, wherever the parameters are to live: there the generator gives what
    it gives one process. One whole parameter exists at a time.

    Returns a line for every parameter, by which ranks can compare what they drew. Raises ValueError if ``initialise``
    does not go once over ``model.named_parameters()``.
    """
    named, seen = list(model.named_parameters()), []

    def one_at_a_time(*_, **__) -> Iterator[tuple[str, Tensor]]:
        for (name, p), dtype in zip(named, dtypes):
            values = torch.empty(p.shape, dtype=dtype)
            yield name, values
            keep(p, values)
            seen.append(f"{name} {values.reshape(-1)[0].item()} ... {values.reshape(-1)[-1].item()}")
    model.named_parameters = one_at_a_time
    try:
        initialise(model)
    finally:
        del model.named_parameters
    if len(seen) != len(named):
        raise ValueError(f"initialise went over {len(seen)} of {len(named)} parameters: it has to go once over all of "
                         "model.named_parameters()")
    return seen


# --- 2. coming and going ---------------------------------------------------------------------------------

def absent(flat) -> None:
    """Give the flat's parameters their shapes, no memory, and NaN to whoever reads them."""
    nothing = torch.full((), math.nan, dtype=flat.dtype, device=flat.device)
    for p in flat.parameters:
        p.data = nothing.expand(p.shape)


class _Unit:
    """What is gathered and freed together."""

    def __init__(self, index: int, flats: list[Flat]):
        self.index, self.flats = index, flats
        self.active = 0  # forwards that are running
        self.ready = False


class Gathering:
    """Hooks on a model's modules that gather flats before they are needed and free them afterwards.

    A weight is read inside of its own module's forward, or after one of the same unit; every rank runs the same modules
    in the same order. A weight that is somehow still referred to when it is freed stays right, and in memory.

    Args:
        modules: the units, in the order of forward.
        units: the flats of the rest, then of each module. A flat has ``parameters``, ``dtype``, ``device``, ``own``,
            ``chunk`` (C,), ``whole`` (P, C) or None, ``empty(dtype)``, and ``view(p, whole)``.
        start: sends for the other rows of ``flat.whole``; returns what waits for them.
    """

    def __init__(self, model: nn.Module, modules: list[nn.Module], units: list[list], start: Callable):
        self.model, self.start_all_gather = model, start
        self.units = [_Unit(i, flats) for i, flats in enumerate(units)]
        self._unit_of = {flat: unit for unit in self.units for flat in unit.flats}
        flat_of = {p: flat for flat in self._unit_of for p in flat.parameters}
        self._current: tuple[_Unit, bool] | None = None
        self._pinned, self._contexts, self._by_storage = False, [], {}
        unit_of_module = dict(zip(modules, self.units[1:]))
        for module in model.modules():
            needed = [self._unit_of[flat_of[p]] for p in module._parameters.values() if p is not None]
            rest = self.units[0] if self.units[0] in needed else None
            unit = unit_of_module.get(module, rest)
            if unit is not None or module is model:
                module.register_forward_pre_hook(lambda *_, unit=unit: self._before(unit), prepend=True)
                module.register_forward_hook(lambda _, __, output, unit=unit: self._after(unit, output),
                                             always_call=True)
        model.register_forward_hook(lambda *_: None if torch.is_grad_enabled() else self.free_all())

    def _before(self, unit: _Unit | None) -> None:
        self._contexts.append(None)  # for _after, which is called even if what follows fails
        if unit is not None:
            unit.active += 1
            # a forward inside of backward repeats one, to save its activations
            self._enter(unit, torch._C._current_graph_task_id() != -1)
        outer = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if outer is not None and getattr(outer[0], "of", None) is self:
            return
        outer_pack, outer_unpack = outer or (lambda t: t, lambda t: t)

        def pack(t: Tensor):
            flat = self._by_storage.get(t.untyped_storage().data_ptr())
            if flat is None or t.dtype != flat.dtype:
                return None, outer_pack(t)
            return flat, (t.size(), t.stride(), t.storage_offset() - flat.whole.storage_offset())

        def unpack(packed):
            flat, place = packed
            if flat is None:
                return outer_unpack(place)
            self._enter(self._unit_of[flat], True)
            size, stride, offset = place
            return flat.whole.as_strided(size, stride, flat.whole.storage_offset() + offset)
        pack.of = self
        self._contexts[-1] = saved_tensors_hooks(pack, unpack)
        self._contexts[-1].__enter__()

    def _after(self, unit: _Unit | None, output) -> None:
        context = self._contexts.pop()
        if context is not None:
            context.__exit__(None, None, None)
        if unit is not None:
            unit.active -= 1
        if unit not in (None, self.units[0]):  # a block that repeats its forward in backward unpacks nothing before
            for y in output if isinstance(output, (tuple, list)) else (output,):
                if isinstance(y, Tensor) and y.requires_grad:
                    y.register_hook(lambda _: self._enter(unit, True))

    @torch.no_grad()
    def _enter(self, unit: _Unit, backward: bool) -> None:
        """The unit computes next: have it whole, free the others, and let the one after it come."""
        if self._current == (unit, backward):
            return
        came_from, last = self._current and self._current[0].index, len(self.units) - 1
        if backward:  # nothing comes behind the first block: the embedding's backward needs no weights
            following = {0: last, 1: None}.get(unit.index, unit.index - 1)
        else:  # after the last block the rest again, and then the turn
            following = 0 if unit.index == last else unit.index + 1
            following = None if unit.index == 0 and came_from == last else following
        following = None if following is None else self.units[following]
        self._current = unit, backward
        for other in self.units:
            if other not in (unit, following) and not other.active:
                self._free(other)
        self._start(unit)
        self._wait(unit)
        if following is not None:
            self._start(following)

    def _start(self, unit: _Unit) -> None:
        for flat in unit.flats if not unit.ready else ():
            if flat.whole is None:
                flat.whole = flat.empty(flat.dtype)
                flat.whole[flat.own] = flat.chunk
                flat.arriving = self.start_all_gather(flat)

    def _wait(self, unit: _Unit) -> None:
        for flat in unit.flats if not unit.ready else ():
            flat.arriving()
            for p in flat.parameters:
                p.data = flat.view(p, flat.whole)
            self._by_storage[flat.whole.untyped_storage().data_ptr()] = flat
        unit.ready = True

    def _free(self, unit: _Unit) -> None:
        if self._pinned:
            return
        for flat in unit.flats:
            if flat.whole is not None:
                if not unit.ready:
                    flat.arriving()  # the backend still writes to it
                self._by_storage.pop(flat.whole.untyped_storage().data_ptr(), None)
                absent(flat)
                flat.whole = flat.arriving = None
        unit.ready = False

    def free_all(self) -> None:
        """Nothing is whole any more, but inside of ``gathered()``."""
        self._current = None
        for unit in self.units:
            self._free(unit)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, every parameter is whole on every rank."""
        for unit in self.units:
            self._start(unit)
        for unit in self.units:
            self._wait(unit)
        self._pinned = True
        try:
            yield
        finally:
            self._pinned = False
            self.free_all()


# --- 3. demo ----------------------------------------------------------------------------------------

def main() -> None:
    from gpt import GPT, GPTConfig
    from zero import ZeRO
    config = GPTConfig(vocab_size=32, context=8, n_layers=4, n_heads=2, d_model=16)
    model = GPT(config, generator=torch.Generator().manual_seed(0))
    trainer = ZeRO(model, torch.optim.AdamW, stage=3)
    gathering, events, most = trainer._gathering, [], 0
    start = gathering.start_all_gather

    def started(flat):
        nonlocal most
        index = gathering._unit_of[flat].index
        events.append(f"block {index}" if index else "rest")
        most = max(most, sum(unit.flats[0].whole is not None for unit in gathering.units))
        return start(flat)
    gathering.start_all_gather = started
    loss = model(torch.zeros(1, 8, dtype=torch.long)).sum()
    forward, events[:] = list(events), []
    loss.backward()
    trainer.finish()
    print(f"forward gathered   {' | '.join(forward)}")
    print(f"backward gathered  {' | '.join(events)}")
    blocks = [f"block {i}" for i in range(1, config.n_layers + 1)]
    right = (forward, events, most) == (["rest", *blocks, "rest"], blocks[::-1], 2)
    print(f"units there at once: {most} at most (expected 2), in the order of the formula: "
          + ("OK" if right else "WRONG, expected its order"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.parse_args()
    try:
        main()
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")
