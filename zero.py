"""ZeRO: data parallelism in which no rank holds what another one holds already.   Rajbhandari et al. 2020 (1910.02054)

Idea      P data-parallel ranks hold everything P times. But a parameter's optimizer state is used once a step, by
          whoever updates it; its gradient, once summed, by the same; and the parameter itself only while its layer
          computes. So all are laid end to end, cut into P chunks, and each rank owns one:
          stage 1 cuts the optimizer's states, stage 2 the gradients too, stage 3 the parameters too (FSDP).
Formula   bytes a parameter, 2 (bf16) + 2 (its gradient) + 12 (fp32 copy and Adam's two moments) = 16 on one rank:
          stage 1   4 + 12/P        reduce-scatter gradients, update the own chunk, all-gather parameters
          stage 2   2 + 14/P        the same, each gradient reduced and freed as soon as backward has made it
          stage 3   16/P            and parameters all-gathered before a layer's forward and again before its backward
          in fp32 the chunk is its own fp32 copy: 4 + 4 + 8 bytes: 8 + 8/P, 4 + 12/P, 16/P
          sent a step, for n bytes of parameters: 2 (P-1)/P n in stages 0, 1, 2, as an all-reduce; 3 (P-1)/P n in 3
Shapes    n numbers of a flat -> (P, C), C = ceil(n/P): row r is rank r's, whatever the parameters' shapes
Also      needs flattening.py (the flats and the two collectives), in stage 3 gathering.py (parameters come and go)
Omits     optimizers that look at a whole matrix (Adafactor, Muon, LAMB: a rank has a piece of it); NVMe
          (ZeRO-Infinity); quantised messages (ZeRO++); a stream of its own for the offload's copies.
Run       python zero.py                                2 processes: every stage's bytes and equality, half a minute
          python zero.py --offload --plot zero.png      optimizer in the host's memory (ZeRO-Offload); bars
          torchrun --standalone --nproc_per_node=2 zero.py    the same on processes that torchrun starts
          Ends with "max |bytes measured / formula - 1| = ..."
Test      pytest tests/test_zero.py
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.autograd import Variable


# --- 1. what a rank owns -------------------------------------------------------------------------------

@dataclass
class Shard:
    """A rank's part of a parameter: elements start .. stop - 1 of the flattened parameter, itself perhaps a slice of
    tensor parallelism. Tensors are (stop - start,), views of what is used: written to in place, then ``refresh()``."""
    name: str
    start: int
    stop: int
    master: Tensor  # the values, as the optimizer has them
    grad: Tensor | None  # reduced; None if no rank used the parameter, or before ``finish()``
    state: dict  # the optimizer's: (stop - start,) tensors or scalars


# --- 2. ZeRO -------------------------------------------------------------------------------------------

def exact_dtype(device: torch.device) -> torch.dtype:
    """For sums of squares: float64, or what a Mac's GPU has instead."""
    return torch.float32 if device.type == "mps" else torch.float64


class ZeRO:
    """Trains one model on P ranks: ``backward()``, ``finish()``, ``clip_grad_norm(1.0)``, ``step()``, ``zero_grad()``.

    The model is not wrapped: its parameters' ``.data`` become views of flat buffers, and hooks are put on parameters
    and, in stage 3, on modules. Between uses a stage-3 parameter has its shape and reads as NaN: look at it inside
    ``with zero.gathered()``. A group of one sends nothing. Gradients are in ``shards()``, ``p.grad`` stays None.

    Args:
        model: the same architecture on every rank; values are taken from the group's first rank. On the "meta" device
            it has none yet: see ``initialise``.
        optimizer: makes the optimizer from a list of {"params": this rank's 1-D shards, **settings}, for example
            ``lambda groups: torch.optim.AdamW(groups, lr=1e-3, fused=True)``; any that treats elements alike.
        group: the ranks that see different data, None for all. On top of tensor parallelism: the data axis.
        stage: 0 (nothing is cut), 1, 2 or 3.
        groups: name, parameter -> the settings of its parameter group, {} by default.
        units: modules that stage 3 gathers one at a time, in the order of forward: ``model.blocks`` by default. What
            they do not have alone is one more unit, used before the first and after the last.
        reduction: "mean" over ranks or "sum" (losses already divided by the samples of the whole batch).
        dtype: of the parameters in use, such as bfloat16; None leaves it. Optimised are copies in ``state_dtype``, at
            least, with the model's own values.
        grad_dtype: accumulates and sends gradients in this dtype; None: in the parameters'.
        offload: masters, states and reduced gradients in the host's memory, the optimizer runs there. Where the
            device is the CPU the same code runs, and the memory is the same memory.
        delayed: step() updates with the gradients of the step before, in the background, while forward and backward
            go on.                                                            Ren et al. 2021 (2101.06840), section 5.2
        bucket_mb: size of the pieces that travel in stages 0, 1 and 2, in 2^20 bytes.
        initialise: draws a meta model's values, one parameter at a time in the order of ``model.named_parameters()``,
            such as ``lambda model: model.initialise(generator)``, with a CPU generator of one seed on all ranks: those
            of one process, and never more than one whole parameter in memory. None: zeros, until ``shards()`` are
            written.
        device: where a meta model goes.

    Raises:
        ValueError: for an argument that cannot be; if models or settings differ between ranks (on all of them).
    """

    def __init__(self, model: nn.Module, optimizer: Callable, group: dist.ProcessGroup | None = None, stage: int = 1, *,
                 groups: Callable[[str, nn.Parameter], dict] | None = None, units: Iterable[nn.Module] | None = None,
                 reduction: str = "mean", dtype: torch.dtype | None = None, grad_dtype: torch.dtype | None = None,
                 state_dtype: torch.dtype = torch.float32, offload: bool = False, delayed: bool = False,
                 bucket_mb: float = 25.0, initialise: Callable[[nn.Module], None] | None = None,
                 device: torch.device | str = "cpu"):
        if stage not in (0, 1, 2, 3) or reduction not in ("mean", "sum") or not bucket_mb > 0 or delayed > offload:
            raise ValueError('ZeRO needs a stage of 0, 1, 2, 3, reduction "mean" or "sum", bucket_mb > 0, and offload '
                             f"to be delayed, got {stage}, {reduction!r}, {bucket_mb}, {offload=} {delayed=}")
        import flattening
        named = list(model.named_parameters())  # a tied parameter comes once
        if not any(p.requires_grad for _, p in named):
            raise ValueError(f"no parameter of {type(model).__name__} requires a gradient: nothing to train")
        is_meta = {p.is_meta for _, p in named}
        if len(is_meta) > 1 or any(b.is_meta for b in model.buffers()) or initialise is not None and is_meta == {False}:
            raise ValueError("either all parameters, and no buffers, are on the meta device, or none are, and there is "
                             "nothing to initialise")
        self.model, self.group, self.stage, self.offload, self.delayed = model, group, stage, offload, delayed
        self.rank, self.P = flattening.rank_and_size(group)
        self._cut = next((p.cut for _, p in named if hasattr(p, "cut")), None)
        self.grad_dtype, is_meta = grad_dtype, is_meta == {True}
        if self.P > 1:
            settings = f"{stage=} {reduction=} {dtype=} {grad_dtype=} {bucket_mb=}"
            flattening.start_equal(model, settings, not is_meta, group)
        dtypes = [p.dtype for _, p in named]
        if is_meta:
            import gathering
            for _, p in named:
                gathering.materialise(p, torch.device(device))
        self._rooms: list[Tensor] = []  # memory of a gradient that has arrived, for the next
        modules = list(getattr(model, "blocks", ()) if units is None else units) if stage == 3 else []
        parts, scale = (1, 0) if stage == 0 else (self.P, self.rank), 1 / self.P if reduction == "mean" else 1.0
        made = flattening.make_flats(
            model, named, modules, bucket_mb * 2**20 if stage < 3 else None, dtype,
            lambda part, *kind: flattening.Flat(part, *parts, *kind, group, scale, self._rooms))
        self._hold(made, modules, state_dtype)
        if initialise is not None:
            drawn = gathering.draw_values(model, dtypes, lambda p, values: self._flat_of[p].keep(p, values), initialise)
            if self.P > 1:
                flattening.agree("ranks drew different values, from generators of different seeds", drawn, group)
        self._make_optimizer(optimizer, groups or (lambda name, p: {}), named)
        self._sync, self._pending, self._in_backward, self._finished, self._next = True, True, False, False, 0
        self._travelling: list[tuple[Flat, Callable, Tensor | None]] = []
        self._used: set[nn.Parameter] = set()  # in this step, on any rank, once ``finish`` is through
        self._update: threading.Thread | None = None
        self._failure: list[BaseException] = []
        me = weakref.ref(self)  # the collector of garbage does not see a cycle through these hooks
        for p in (p for flat in self._trained for p in flat.parameters):
            p.register_post_accumulate_grad_hook(lambda p: me() and me()._on_gradient(p))

    # --- at the start ---

    @torch.no_grad()
    def _hold(self, units: list[list[Flat]], modules: list[nn.Module], state_dtype: torch.dtype) -> None:
        """Make the flat buffers, each with the parameters' values, one after the other."""
        # Backward ends with the rest: the embedding.
        self._flats = sum([*units[1:][::-1], units[0]] if self.stage == 3 else units, [])
        self._trained = [flat for flat in self._flats if flat.trained]
        self._flat_of = {p: flat for flat in self._flats for p in flat.parameters}
        if self.stage == 3:
            import gathering
        largest = max(flat.parts * flat.C for flat in self._trained)
        for tag, flat in enumerate(self._flats):
            flat.tag, flat.room_size = 2 * tag, largest if self.stage == 2 else 0
            dtype, device = flat.dtype, flat.device
            if self.stage < 3:
                flat.whole = flat.empty(dtype).zero_()
                flat.chunk = flat.whole[flat.own]
            else:
                flat.chunk = torch.zeros(flat.C, dtype=dtype, device=device)
            flat.master, pinned = flat.chunk, self.offload and device.type == "cuda"
            wide = max((torch.promote_types(p.dtype, state_dtype) for p in flat.parameters), key=lambda d: d.itemsize)
            if flat.trained and (self.offload or wide != dtype):
                host = "cpu" if self.offload else device
                flat.master = torch.zeros(flat.C, dtype=wide, device=host, pin_memory=pinned)
            if flat.trained:
                kind = self.grad_dtype or dtype
                if self.stage < 2:
                    flat.whole_gradient = flat.empty(kind).zero_()
                if self.stage < 2 and not self.offload:
                    flat.gradient = flat.whole_gradient[flat.own]
                else:
                    flat.gradient = torch.zeros(flat.C, dtype=kind, device=flat.master.device, pin_memory=pinned)
                flat.spare = torch.zeros_like(flat.gradient) if self.delayed else None
            for p in flat.parameters:
                flat.keep(p, p.detach())
                if self.stage < 3:
                    p.data = flat.view(p, flat.whole)
            flat.missing = set(flat.parameters)
            if self.stage == 3:
                gathering.absent(flat)  # now, not when all have a copy
        if self.stage == 3:
            self._gathering = gathering.Gathering(self.model, modules, units, lambda flat: flat.start_all_gather())

    def _make_optimizer(self, optimizer: Callable, groups: Callable, named: list) -> None:
        self._masters, made = {}, {}
        for name, p in named:
            flat = self._flat_of[p]
            start, stop, place = flat.owned(p)
            self._masters[p] = flat.master[place].detach()
            if flat.trained:
                settings = groups(name, p)
                # a group that has nothing here has to be one on every rank all the same
                made.setdefault(repr(sorted(settings.items())), {"params": [], **settings})
                if stop > start:
                    made[repr(sorted(settings.items()))]["params"].append(self._masters[p])
        self.optimizer: torch.optim.Optimizer = optimizer(list(made.values()))
        self._names = {p: name for name, p in named}

    def _free(self) -> None:
        if self.stage == 3:
            self._gathering.free_all()

    def gathered(self) -> AbstractContextManager:
        """``with zero.gathered():`` every parameter is whole on every rank, to be read: for evaluation, decoding,
        saving. All ranks call it."""
        return self._gathering.gathered() if self.stage == 3 else nullcontext()

    # --- gradients ---

    @torch.no_grad()
    def _on_gradient(self, p: nn.Parameter) -> None:
        """Called by autograd as soon as p.grad is complete for this backward."""
        flat, sends = self._flat_of[p], self._sync or self.stage == 3
        self._pending = True
        if sends and self.stage < 2 and p not in flat.missing:
            raise RuntimeError("this step's gradient was already sent: call finish() after the last "
                               "backward() of a step, and run those before it under no_sync()")
        if sends and self.stage >= 2 and not self._in_backward:
            self._in_backward = True  # at its end also units leave of which a parameter was not used
            Variable._execution_engine.queue_callback(self._flush)
        if sends or p.grad.dtype != (self.grad_dtype or p.dtype):
            flat.take_gradient(p)
        if sends:
            flat.missing.discard(p)
            self._send_full()

    def _send_full(self) -> None:
        """Collectives have no names: flats leave in one order on every rank, a full one waits for those before it."""
        while self._next < len(self._trained) and not self._trained[self._next].missing:
            flat = self._trained[self._next]
            self._next += 1
            # messages in stage 1, whole gradients in stages 2 and 3 take memory: only one or two are on their way
            while self.stage and len(self._travelling) >= (1 if self.stage >= 2 else 2):
                self._arrive()
            self._used |= flat.held
            # the first part of a step's gradient arrives where it stays
            wait = flat.start_reduce(flat.gradient if self.stage >= 2 and not (self.offload or flat.filled) else None)
            self._travelling.append((flat, wait, flat.room))
            flat.held = set()
            if self.stage >= 2:
                flat.missing, flat.whole_gradient, flat.room = set(flat.parameters), None, None

    def _arrive(self) -> None:
        flat, wait, room = self._travelling.pop(0)
        total = wait()
        # to the host where it is offloaded: the first part of a step streams, later ones are added there
        if flat.filled:
            flat.gradient += total.to(flat.gradient.device)
        else:
            flat.gradient.copy_(total, non_blocking=total.is_cuda)  # see _wait_for_copies
        flat.filled = True
        if self.stage >= 2:
            self._rooms[:] = [room]

    @torch.no_grad()
    def _flush(self) -> None:
        """Send what was not used, or not given to a hook, too: every rank sends the same."""
        for flat in self._trained[self._next:]:
            for p in list(flat.missing):
                flat.take_gradient(p)
            flat.missing.clear()
            self._send_full()
        self._in_backward = self._pending = False
        if self.stage >= 2:
            self._next = 0

    @torch.no_grad()
    def finish(self) -> None:
        """After the step's last backward: the shards' gradients are complete. Once a step, on every rank.

        Raises:
            RuntimeError: from torch.distributed, if another rank died or is later than the group's time-out.
        """
        if self._pending:
            self._flush()
        parameters = [p for flat in self._trained for p in flat.parameters]
        used = torch.tensor([float(p in self._used) for p in parameters], device=self._trained[0].device)
        work = dist.all_reduce(used, group=self.group, async_op=True) if self.P > 1 else None
        while self._travelling:
            self._arrive()
        self._rooms.clear()
        if work is not None:  # an optimizer leaves alone what no rank used
            work.wait()
            self._used = {p for p, count in zip(parameters, used.tolist()) if count}
        for flat in self._trained:
            flat.missing = set(flat.parameters)
        self._next, self._pending, self._in_backward, self._finished = 0, True, False, True
        self._free()
        self._wait_for_copies()

    def _wait_for_copies(self) -> None:
        """Between the host and a GPU they go on while Python does, and until they are done neither end may change."""
        if self.offload and self._trained[0].device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients of the backward() calls inside are accumulated, in stages 0, 1 and 2 whole on this rank and not
        sent; stage 3 has no place for them and reduces them every time."""
        before, self._sync = self._sync, False
        try:
            yield
        finally:
            self._sync = before

    def _gradient(self, p: nn.Parameter) -> Tensor | None:
        flat = self._flat_of[p]
        return flat.gradient[flat.owned(p)[2]] if self._finished and p in self._used else None

    def _gradients(self, flat: Flat) -> dict[nn.Parameter, Tensor | None]:
        return {p: self._gradient(p) for p in flat.parameters}

    @torch.no_grad()
    def squared_norm(self) -> Tensor:
        """|g|^2 over the whole model in ``exact_dtype``: every rank's shards, slices of tensor parallelism summed over
        their ranks, what all of those have counted once. A scalar, the same on every rank; all of them call it."""
        device = self._trained[0].device
        exact = exact_dtype(device)
        squares = torch.zeros(2, dtype=exact, device=device)  # of what is whole, of slices
        for flat in self._trained:
            for p in flat.parameters:
                grad, cut = self._gradient(p), getattr(p, "cut", None)
                if grad is not None and grad.numel():
                    norm = torch.linalg.vector_norm(grad, dtype=torch.promote_types(grad.dtype, torch.float32))
                    squares[int(cut is not None)] += (norm.to(exact).square() / (cut.copies if cut else 1)).to(device)
        if self.P > 1 and self.stage > 0:
            dist.all_reduce(squares, group=self.group)
        if self._cut is not None and dist.get_world_size(self._cut.group) > 1:
            slices = squares[1:].clone()
            dist.all_reduce(slices, group=self._cut.group)
            squares[1:] = slices
        return squares.sum()

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float, square: Tensor | None = None) -> Tensor:
        """``torch.nn.utils.clip_grad_norm_`` over all shards; returns the norm before, the same on every rank.
        ``square``: |g|^2 if more than this model counts (other stages of a pipeline)."""
        norm = (self.squared_norm() if square is None else square).sqrt()
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for flat in self._trained:
            flat.gradient.mul_(factor.to(flat.gradient.device, flat.gradient.dtype))
        return norm

    # --- the step ---

    @torch.no_grad()
    def step(self) -> None:
        """Update the own chunk of every flat and bring the parameters to it. All ranks call it."""
        if not self.delayed:
            self._optimize([(flat, self._gradients(flat)) for flat in self._trained], self._publish)
            return self._arrive_whole()
        self._join()
        for flat in self._trained:  # of the step before
            self._publish(flat)
        self._wait_for_copies()
        work = []
        for flat in self._trained:
            work.append((flat, self._gradients(flat)))
            flat.gradient, flat.spare = flat.spare, flat.gradient
        self._update = threading.Thread(target=self._in_background, args=(work,))
        self._update.start()
        self._arrive_whole()

    def _optimize(self, work: list, done: Callable[[Flat], None]) -> None:
        """One flat after the other: in half precision only one has its gradient in fp32, too, and a chunk travels while
        the next is updated."""
        for flat, gradients in work:
            for p, gradient in gradients.items():
                if gradient is not None and gradient.numel():
                    self._masters[p].grad = gradient.to(flat.master.dtype)
            self.optimizer.step()
            for p in gradients:
                self._masters[p].grad = None
            done(flat)

    def _in_background(self, work: list) -> None:
        try:
            with torch.no_grad():
                self._optimize(work, lambda flat: None)
        except BaseException as error:  # raised again where somebody can see it
            self._failure.append(error)

    def _join(self) -> None:
        if self._update is not None:
            self._update.join()
            self._update = None
        if self._failure:
            raise self._failure.pop()

    def _publish(self, flat: Flat) -> None:
        if flat.master is not flat.chunk:
            flat.chunk.copy_(flat.master, non_blocking=flat.chunk.is_cuda)
        if flat.parts > 1 and self.stage < 3:
            flat.arriving = flat.start_all_gather()

    def _arrive_whole(self) -> None:
        self._free()
        for flat in self._flats:
            if self.stage < 3 and flat.arriving is not None:
                flat.arriving()
                flat.arriving = None

    def zero_grad(self) -> None:
        """Forget the gradient."""
        self._used, self._finished = set(), False
        for flat in self._trained:
            flat.filled, flat.held = False, set()
            for p in flat.parameters:
                p.grad = None

    @property
    def param_groups(self) -> list[dict]:
        """The optimizer's groups, for the learning rate."""
        self._join()  # an update in the background goes by the settings with which it began
        return self.optimizer.param_groups

    # --- what the ranks hold ---

    def shards(self) -> dict[str, Shard]:
        """This rank's part of every parameter by name, empty where it has none; what is frozen is there, too."""
        self._join()
        shards = {}
        for p, name in self._names.items():
            start, stop, _ = self._flat_of[p].owned(p)
            state = self.optimizer.state[self._masters[p]] if p.requires_grad and stop > start else {}
            gradient = self._gradient(p) if p.requires_grad else None
            shards[name] = Shard(name, start, stop, self._masters[p], gradient, state)
        return shards

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the model's parameters to the shards' values after someone wrote to those. All ranks call it."""
        self._join()
        for flat in self._flats:
            self._publish(flat)
        self._arrive_whole()

    def bytes_held(self) -> dict[str, int]:
        """Bytes of every tensor held, each storage counted once: "parameters", "gradients", "states" (masters too) and,
        of all these together, "host": how much is offloaded."""
        states = [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        kinds = {"parameters": [*self.model.parameters(), *self.model.buffers(), *(f.chunk for f in self._flats),
                                *(f.whole for f in self._flats)],
                 "gradients": [t for f in self._trained for t in (f.gradient, f.whole_gradient, f.spare)]
                 + [p.grad for p in self.model.parameters()],
                 "states": [*(f.master for f in self._flats), *states]}
        seen, held, host = set(), {}, 0
        for kind, tensors in kinds.items():
            storages = {t.untyped_storage().data_ptr(): t for t in tensors if t is not None and t.numel()}
            fresh = {key: t.untyped_storage().nbytes() for key, t in storages.items() if key not in seen}
            held[kind] = sum(fresh.values())
            seen |= set(fresh)
        for flat in self._trained if self.offload else ():
            host += flat.master.nbytes + flat.gradient.nbytes + (0 if flat.spare is None else flat.spare.nbytes)
        held["host"] = host + (sum(t.nbytes for t in states) if self.offload else 0)
        return held


# --- 3. demo: zero_memory.py, beside this file ---------------------------------------------------------

if __name__ == "__main__":
    try:
        from zero_memory import main  # every stage beside one process, and its bytes beside the formula
    except ImportError as error:
        print(f"zero.py: {error}: copy that file beside this one, or install that package", file=sys.stderr)
        sys.exit(2)
    main("zero.py")
