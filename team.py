"""A team of processes trains several models at once: data and tensor parallelism and ZeRO, for policy and critic alike.

Idea      Alignment trains two models in one step, and asks others that stand still. Neighbours, tp of them, share every
          matrix and work on the same rows; the rows are divided over the rest, dp, who divide the optimizer's states,
          gradients and weights too (ZeRO). Whoever writes a loss sees none of it: log-probs in, a step out, checkpoints
          under full names. Answers are written on weights that are gathered once for all of them, not for every token.
Formula   processes = dp * tp;   gradient = sum over the dp parts of the batch
          |g|^2 over all models together: slices summed over tp, ZeRO's shards over dp, what all have counted once
Shapes    a batch of B rows, B / dp on each process; logits (B, T, Vp), Vp = ceil(V / tp)
Omits     pipelines, context and expert parallelism, bf16: layout.py has them for one model.
Run       python team.py    2 processes train a tiny GPT in three layouts: 15 s
          Ends with "max |layout - one process| = ..."
Test      pytest tests/test_team.py
"""

import argparse
import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor


# --- 1. who does what -----------------------------------------------------------------------

class Team:
    """A run's processes in their layout: neighbours, ``tp`` of them, work together on one part of every batch.

    Args:
        world: processes.World, of processes that all call this.
        zero: ZeRO's stage, for what is trained.
        timeout: seconds after which a silent process counts as lost.

    Raises:
        ValueError: if ``tp`` does not divide the processes.
    """

    def __init__(self, world, tp: int = 1, zero: int = 0, timeout: int = 600):
        import parallel
        if world.size % tp:
            raise ValueError(f"--tp={tp} does not divide {world.size} processes: start a multiple of {tp} by torchrun")
        self.world, self.tp, self.zero = world, tp, zero
        self.part, self.parts = world.rank // tp, world.size // tp  # of a batch
        mesh = parallel.mesh(self.parts, tp, timeout=timedelta(seconds=timeout)) if tp > 1 else None
        self.data, self.slices = (mesh.data, mesh.tp) if mesh else (None, None)  # groups; None: all processes

    def cut(self, model: nn.Module) -> nn.Module:
        """Leave this process its slice of a model's matrices, in place. ValueError if they cannot be shared so."""
        if self.tp == 1:
            return model
        from tensor_parallel import tensor_parallel
        return tensor_parallel(model, self.slices)

    def losses(self, model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
        """(logits as the model gives them, targets) -> -log p(target)."""
        from rlhf import token_losses
        from tensor_parallel import vocabulary_cross_entropy
        if self.tp == 1:
            return token_losses
        return lambda logits, targets: vocabulary_cross_entropy(logits, targets, model.config.vocab_size, self.slices)

    def log_probs(self, model: nn.Module, tokens: Tensor, rows=None) -> Tensor:
        """log p(token t | tokens before it) at place t, with gradients: tokens (B, T) -> (B, T). ``rows``, a
        packing.PackedRows: before it in its own text; at a text's first token stands a number without meaning."""
        import rlhf
        forward = model if rows is None else functools.partial(model, cache=rows)
        return rlhf.aligned_log_probs(forward, tokens, losses=self.losses(model))

    def whole_logits(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """A slice of the vocabulary's logits -> all of them: (B, Vp) -> (B, V)."""
        from tensor_parallel import gather_from_ranks
        if self.tp == 1:
            return lambda logits: logits
        return lambda logits: gather_from_ranks(logits, -1, self.slices)[..., :model.config.vocab_size]

    def share(self, count: int) -> slice:
        """This part's rows of ``count``: as equal as can be, earlier rows in earlier parts."""
        return slice(count * self.part // self.parts, count * (self.part + 1) // self.parts)

    def deal(self, batch: list) -> tuple[list, float]:
        """(this part's rows of a batch, 1.0); or, if there are too few, one that does not count, and 0.0: where weights
        are gathered as they are needed, every process has to run forward and backward."""
        mine = batch[self.part::self.parts]
        return (mine, 1.0) if mine else (batch[:1], 0.0)

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over the parts of a batch."""
        return [total / self.tp for total in self.world.sum(values)]

    def total(self, x: Tensor) -> Tensor:
        """The sum of a tensor over the parts of a batch."""
        x = x.clone()
        if self.parts > 1:
            dist.all_reduce(x, group=self.data)
        return x

    def gather(self, value) -> list:
        """Every part's value."""
        return self.world.gather(value)[::self.tp]


# --- 2. what is trained ---------------------------------------------------------------------

class Trained:
    """Models that train together on a team's layout, and their optimizers: gradients summed over the parts of a batch.
    ``rlhf.ppo_update`` takes it for an optimizer.

    Args:
        models: language models, or reward models with one.
        parts: name -> module: under which names a checkpoint has the parameters of these models.
        optimizer, settings: as of zero.ZeRO.
    """

    def __init__(self, team: Team, models: Sequence[nn.Module], parts: dict[str, nn.Module], optimizer: Callable,
                 settings: Callable):
        from zero import ZeRO
        self.team, self.parts = team, parts
        self.names = {p: (part, name) for part, module in parts.items() for name, p in module.named_parameters()}
        self.zeros = [ZeRO(model, optimizer, team.data, team.zero, groups=settings, reduction="sum",
                           units=getattr(model, "model", model).blocks) for model in models]

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, all weights are whole on every process (but for tensor parallelism): no forward waits for others."""
        with contextlib.ExitStack() as stack:
            for zero in self.zeros:
                stack.enter_context(zero.gathered())
            yield

    def finish(self) -> None:
        """After the step's last backward: the gradients are complete. Once a step, on every process."""
        for zero in self.zeros:
            zero.finish()

    def clip(self, most: float) -> Tensor:
        """Scale the gradient of all models to a norm of at most ``most``; returns the norm before, the same on every
        process."""
        square = sum(zero.squared_norm() for zero in self.zeros)
        return [zero.clip_grad_norm(most, square) for zero in self.zeros][0]

    def step(self) -> None:
        """The optimizers' step."""
        for zero in self.zeros:
            zero.step()

    def zero_grad(self) -> None:
        """Forget the gradient."""
        for zero in self.zeros:
            zero.zero_grad()

    @property
    def param_groups(self) -> list[dict]:
        """The optimizers' groups, for the learning rate."""
        return [group for zero in self.zeros for group in zero.param_groups]

    def _held(self) -> Iterator[tuple]:
        """(parameter, what this process holds of it: zero.Shard)"""
        for zero in self.zeros:
            named = dict(zero.model.named_parameters())
            yield from ((named[name], shard) for name, shard in zero.shards().items())

    @torch.no_grad()
    def add(self, p: nn.Parameter, value: Tensor) -> None:
        """p += value, on all processes, who all call this."""
        for q, shard in self._held():
            if q is p:
                shard.master.add_(value.to(shard.master))
        self.refresh()

    def refresh(self) -> None:
        """Bring the models to the weights that are optimised."""
        for zero in self.zeros:
            zero.refresh()

    def tensors(self, states: dict[str, tuple[int, ...]] | None = None) -> dict[str, dict]:
        """What this process holds, as checkpoint.save and load_into take it. ``states``: ``checkpoint.shapes`` of what
        will be loaded: room for the optimizer's states is made."""
        from pieces import pieces_of
        from tensor_parallel import rank_and_size
        found: dict[str, dict] = {part: {} for part in [*self.parts, "optimizer"]}
        for p, shard in self._held():
            part, name = self.names[p]
            cut, shape, dim, first = getattr(p, "cut", None), tuple(p.shape), 0, 0
            if cut is not None:  # a slice of a matrix
                dim, first = cut.dim, rank_and_size(cut.group)[0] // cut.copies * p.size(cut.dim)
                shape = (*shape[:dim], cut.size, *shape[dim + 1:])
            if shard.stop > shard.start:
                for key, size in (states or {}).items():
                    if key.startswith(f"optimizer/{part}.{name}/"):
                        like = torch.zeros_like(shard.master)
                        shard.state[key.rpartition("/")[2]] = like if size == shape else like.new_zeros(size).float()

            def pieces(held: Tensor):
                if held.dim() == 0:
                    return held
                return pieces_of(held.detach(), shard.start, tuple(p.shape), shape, dim, first)

            found[part][name] = pieces(shard.master)
            found["optimizer"][f"{part}.{name}"] = {key: pieces(state) for key, state in shard.state.items()}
        return found


# --- 3. demo --------------------------------------------------------------------------------

LAYOUTS = {"dp 2": {}, "tp 2": {"tp": 2}, "dp 2, zero 3": {"zero": 3}}


def _train(team: Team, steps: int, seed: int) -> Tensor:
    """The weights after so many steps on random texts, end to end."""
    import checkpoint
    import gpt
    model = gpt.GPT(gpt.GPTConfig(61, 16, 2, 2, 32), generator=torch.Generator().manual_seed(seed)).double()
    trained = Trained(team, [team.cut(model)], {"model": model}, lambda groups: torch.optim.AdamW(groups, lr=1e-3),
                      lambda name, p: {})
    texts = torch.randint(61, (steps, 8, 16), generator=torch.Generator().manual_seed(seed))
    for batch in texts:
        loss = -team.log_probs(model, batch[team.share(8)])[:, 1:].sum() / (8 * 15)
        loss.backward()
        trained.finish()
        trained.clip(1.0)
        trained.step()
        trained.zero_grad()
    with tempfile.TemporaryDirectory() as folder:  # as any other layout would read it
        folder = team.world.first(lambda: folder)
        path = checkpoint.save(folder, steps, trained.tensors(), {}, group=team.world.everyone)
        weights = checkpoint.load(path, ("model",))["model"]
        team.world.gather(None)  # all have read
    return torch.cat([p.flatten() for _, p in sorted(weights.items())])


def _demo(rank: int, steps: int, seed: int, rendezvous: str) -> None:
    """What every process runs; the first prints."""
    import processes
    torch.set_num_threads(1)
    expected = _train(Team(processes.World()), steps, seed)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    world, worst = processes.World(rank, 2, rank, 2), 0.0
    for name, layout in LAYOUTS.items():
        error = (_train(Team(world, **layout), steps, seed) - expected).abs().max().item()
        worst = torch.tensor([worst, error]).max().item()  # NaN, if there is one; Python's max would lose it
        world.say(f"{name:14} max |difference of a weight| = {error:.1e}")
    world.say(f"max |layout - one process| = {worst:.1e} after {steps} steps in float64: "
              + ("OK, below 1e-10" if worst < 1e-10 else "WRONG, expected below 1e-10"))
    dist.destroy_process_group()


def main(steps: int, seed: int) -> None:
    if steps < 1 or not 0 <= seed < 2**32:
        raise ValueError(f"--steps must be at least 1 and --seed in 0 .. 2^32 - 1, got {steps} and {seed}")
    from processes import start_ranks
    with tempfile.TemporaryDirectory() as folder:  # the processes meet through a file: no port to be taken
        start_ranks(_demo, (steps, seed, (Path(folder) / "ranks").as_uri()), 2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and texts (default %(default)s)")
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")
