"""Recurrent networks: the RNN, the GRU and the LSTM.   Elman 1990; Cho et al. 2014 (1406.1078); Gers et al. 2000

Idea      A recurrent network reads a sequence step by step into a state of fixed size: one small network, used again
          and again. What it learns must travel back through all those steps, and fades on the way. Open gates of a
          GRU or an LSTM let the state through nearly unchanged, and with it the gradient.
Formula   RNN   h' = tanh(W x + U h + b)
          GRU   r, z = sigmoid(..), n = tanh(W x + b + r (U h + b')),  h' = (1 - z) n + z h
          LSTM  i, f, o = sigmoid(..), g = tanh(..),  c' = f c + i g,  h' = o tanh(c')     (.. = W x + U h + b)
Shapes    x (B, S, inputs), state (B, D) or two of them -> outputs (B, S, D), the last state
Omits     stacked layers, dropout, the LSTM's peephole connections.
Run       python rnn.py                  the four shapes, and gradients that vanish: a few seconds
          python rnn.py --plot rnn.png   the gradients by distance as a picture
          Ends with "left after 40 steps: ... each above the one before: True ..."
Test      pytest tests/test_rnn.py
"""

import argparse
import os
from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

State = tuple[Tensor, ...]  # (h,) of an RNN or GRU, (h, c) of an LSTM; each (B, D)


# --- 1. three cells, as the formulas read -----------------------------------------------------
# Weights in torch's layout: W (gates D, inputs), U (gates D, D), both biases (gates D,), gate below gate.

def rnn_cell(x: Tensor, state: State, W: Tensor, U: Tensor, b_x: Tensor, b_h: Tensor) -> State:
    """One step: x (B, inputs), state (h,) -> (h',).   Elman 1990"""
    return (torch.tanh(x @ W.T + b_x + state[0] @ U.T + b_h),)


def gru_cell(x: Tensor, state: State, W: Tensor, U: Tensor, b_x: Tensor, b_h: Tensor) -> State:
    """One step: x (B, inputs), state (h,) -> (h',).   Cho et al. 2014 (1406.1078); the reset gate as in torch"""
    (h,) = state
    (x_r, x_z, x_n), (h_r, h_z, h_n) = (x @ W.T + b_x).chunk(3, -1), (h @ U.T + b_h).chunk(3, -1)  # each (B, D)
    reset, update = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
    new = torch.tanh(x_n + reset * h_n)
    return ((1 - update) * new + update * h,)


def lstm_cell(x: Tensor, state: State, W: Tensor, U: Tensor, b_x: Tensor, b_h: Tensor) -> State:
    """One step: x (B, inputs), state (h, c) -> (h', c').   Gers et al. 2000: the LSTM with forget gates"""
    h, c = state
    i, f, g, o = (x @ W.T + b_x + h @ U.T + b_h).chunk(4, -1)  # each (B, D)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


# Name -> the cell, how many gates its weights have, and of how many tensors its state consists.
CELLS = {"rnn": (rnn_cell, 1, 1), "gru": (gru_cell, 3, 1), "lstm": (lstm_cell, 4, 2)}


def naive_recurrent(cell: str, x: Tensor, lengths: Sequence[int], weights: Sequence[Tensor],
                    reverse: bool = False) -> tuple[Tensor, State]:
    """``Recurrent`` sentence by sentence and step by step: x (B, S, inputs) -> (B, S, D), last state."""
    step, _, n_state = CELLS[cell]
    D, outputs, last = weights[1].size(1), [], []
    for row, length in zip(x, lengths):
        state, steps = (row.new_zeros(1, D),) * n_state, range(length)
        written = [row.new_zeros(D)] * len(row)  # outputs after the sentence's end are zero
        for t in reversed(steps) if reverse else steps:
            state = step(row[t:t + 1], state, *weights)
            written[t] = state[0][0]
        outputs.append(torch.stack(written))
        last.append(state)
    return torch.stack(outputs), tuple(torch.cat(part) for part in zip(*last))


# --- 2. a recurrent layer, fast ---------------------------------------------------------------

class Recurrent(nn.Module):
    """A layer of cells over time. Only U h depends on the step before: W x is one product for all steps, and the
    gates of a step are one product, too. Parameters have the names and layout of torch's nn.RNN, nn.GRU and nn.LSTM,
    whose state_dict() loads as it is.

    Args:
        d_input, d_model: widths of the input and of the state, D.
        cell: "rnn", "gru" or "lstm".
        reverse: read from the end of each sentence to its start.
        generator: draws the weights, uniform within 1 / sqrt(D).
        forget_bias: added to the bias of an LSTM's forget gate: gates that begin open remember.   Gers et al. 2000

    Raises:
        ValueError: for another cell, a width below 1, or an input, length or state that does not fit.
    """

    def __init__(self, d_input: int, d_model: int, cell: str = "lstm", reverse: bool = False,
                 generator: torch.Generator | None = None, forget_bias: float = 0.0):
        super().__init__()
        if cell not in CELLS or d_input < 1 or d_model < 1:
            raise ValueError(f"cell must be one of {', '.join(CELLS)} and widths at least 1, "
                             f"got {cell!r}, {d_input} and {d_model}")
        _, gates, self.n_state = CELLS[cell]
        self.cell, self.reverse, self.d_model = cell, reverse, d_model
        self.weight_ih_l0 = nn.Parameter(torch.empty(gates * d_model, d_input))
        self.weight_hh_l0 = nn.Parameter(torch.empty(gates * d_model, d_model))
        self.bias_ih_l0 = nn.Parameter(torch.empty(gates * d_model))
        self.bias_hh_l0 = nn.Parameter(torch.empty(gates * d_model))
        for p in self.parameters():
            nn.init.uniform_(p, -d_model ** -0.5, d_model ** -0.5, generator=generator)
        if cell == "lstm":
            self.bias_ih_l0.data[d_model:2 * d_model] += forget_bias

    def step(self, projected: Tensor, state: State) -> State:
        """One step from W x + b, (B, gates D), and the state."""
        h, U, D = state[0], self.weight_hh_l0.t(), self.d_model
        if self.cell == "rnn":
            return (torch.addmm(projected, h, U).tanh(),)
        if self.cell == "gru":
            hidden = torch.addmm(self.bias_hh_l0, h, U)  # (B, 3 D)
            reset, update = (projected[:, :2 * D] + hidden[:, :2 * D]).sigmoid().chunk(2, 1)
            new = torch.addcmul(projected[:, 2 * D:], reset, hidden[:, 2 * D:]).tanh()
            return (torch.lerp(new, h, update),)  # (1 - z) n + z h
        i, f, g, o = torch.addmm(projected, h, U).chunk(4, 1)
        c = torch.addcmul(f.sigmoid() * state[1], i.sigmoid(), g.tanh())
        return o.sigmoid() * c.tanh(), c

    def forward(self, x: Tensor, state: State | None = None,
                lengths: Tensor | None = None) -> tuple[Tensor, State]:
        """x (B, S, inputs) -> outputs (B, S, D) and the state after each row's last step.

        Row b has lengths[b] steps, or all S; outputs behind them are zero. ``state``: the first, None is zero.
        """
        if x.dim() != 3 or x.size(-1) != self.weight_ih_l0.size(1) or not x.numel():
            raise ValueError(f"x must be (B, S, {self.weight_ih_l0.size(1)}) and not empty, got shape {tuple(x.shape)}")
        B, S, _ = x.shape
        if lengths is not None and (lengths.shape != (B,) or lengths.min() < 1 or lengths.max() > S):
            raise ValueError(f"lengths must be {B} values in 1 .. {S}, got {lengths.tolist()}")
        state = (x.new_zeros(B, self.d_model),) * self.n_state if state is None else state
        if [part.shape for part in state] != [(B, self.d_model)] * self.n_state:
            raise ValueError(f"the state of this {self.cell} must be {self.n_state} of shape ({B}, {self.d_model}), "
                             f"got {[tuple(part.shape) for part in state]}")
        bias = self.bias_ih_l0 if self.cell == "gru" else self.bias_ih_l0 + self.bias_hh_l0
        projected = F.linear(x, self.weight_ih_l0, bias).transpose(0, 1).contiguous().unbind()  # S of (B, gates D)
        shortest, outputs = S, [None] * S
        if lengths is not None:
            inside = (torch.arange(S, device=x.device)[:, None] < lengths)[..., None]  # (S, B, 1)
            shortest = int(lengths.min())
        for t in reversed(range(S)) if self.reverse else range(S):
            new = self.step(projected[t], state)
            if t >= shortest:  # rows that end before t keep their state
                new = tuple(torch.where(inside[t], after, before) for after, before in zip(new, state))
            state, outputs[t] = new, new[0]
        outputs = torch.stack(outputs, 1)  # (B, S, D)
        return outputs if shortest == S else outputs * inside.transpose(0, 1), state


def gradient_by_distance(layer: Recurrent, x: Tensor) -> Tensor:
    """How much the last state h feels the input k steps before it: |d sum(h) / d x|, mean over the batch.

    x (B, S, inputs) -> (S,), k = 0 first.   Hochreiter 1991; Bengio et al. 1994; Pascanu et al. 2013 (1211.5063)
    """
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x)[1][0].sum(), x)
    norms = gradient.norm(dim=-1).mean(0)  # (S,)
    return norms if layer.reverse else norms.flip(0)  # what was read last comes first


# --- 3. what goes in and what comes out: four shapes of one network ---------------------------

class RecurrentNetwork(nn.Module):
    """Ids in, scores of ids out, by an embedding, a recurrent layer and a linear one, in the four shapes that come
    of keeping or dropping steps of the input and of the output. Translation is the second after the third."""

    def __init__(self, vocab_size: int, d_model: int, cell: str = "lstm", generator: torch.Generator | None = None):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.layer = Recurrent(d_model, d_model, cell, generator=generator)
        self.head = nn.Linear(d_model, vocab_size)
        for p in (self.embedding.weight, self.head.weight, self.head.bias):
            nn.init.normal_(p, 0.0, d_model ** -0.5, generator=generator)

    def many_to_many(self, tokens: Tensor) -> Tensor:
        """A label for every word, a next word for every prefix: (B, T) -> (B, T, V)."""
        return self.head(self.layer(self.embedding(tokens))[0])

    def many_to_one(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """A class for a whole sentence, from the last state: (B, T) -> (B, V)."""
        return self.head(self.layer(self.embedding(tokens), lengths=lengths)[1][0])

    def one_to_one(self, tokens: Tensor) -> Tensor:
        """A single step, which makes it an ordinary network: (B,) -> (B, V)."""
        return self.many_to_many(tokens[:, None])[:, 0]

    def one_to_many(self, tokens: Tensor, steps: int) -> Tensor:
        """A sequence from one input, every output the next input: (B,) -> ids (B, steps)."""
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        state, written = None, [tokens]
        for _ in range(steps):
            output, state = self.layer(self.embedding(written[-1][:, None]), state)
            written.append(self.head(output[:, 0]).argmax(-1))  # (B,)
        return torch.stack(written[1:], 1)


# --- 4. demo ----------------------------------------------------------------------------------

def new_figure(path: str | None, width: float, height: float):
    """A matplotlib figure to be saved under ``path``, None without one. ValueError without matplotlib, and for what
    cannot be drawn there: now, not after the work."""
    if path is None:
        return None
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    try:
        if str(path).rpartition(".")[2].lower() not in figure.canvas.get_supported_filetypes():
            raise OSError(None, "no format of pictures has that name")
        is_new = not os.path.exists(path)
        open(path, "ab").close()  # keeps a picture that is there
        if is_new:
            os.remove(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be drawn ({error.strerror}): name a picture in a folder that is "
                         "there") from None
    return figure


def _draw(figure, path: str, norms: dict[str, Tensor]) -> None:
    axes = figure.subplots()
    for name, values in norms.items():
        axes.semilogy(values.numpy(), label=name)
    axes.set(title="vanishing gradients", xlabel="steps between input and output", ylabel="gradient norm")
    axes.legend()
    figure.savefig(path, dpi=120)
    print(f"\ndrawn: {path}")


def main(d_model: int, distance: int, batch: int, seed: int, plot: str | None) -> None:
    if min(d_model, distance, batch) < 1 or not 0 <= seed < 2**32:
        raise ValueError("--d_model, --distance and --batch must be at least 1 and --seed in 0 .. 2^32 - 1, "
                         f"got {d_model}, {distance}, {batch} and {seed}")
    figure, generator = new_figure(plot, 6.4, 4.8), torch.Generator().manual_seed(seed)
    network, tokens = RecurrentNetwork(9, 8, generator=generator), torch.zeros(2, 5, dtype=torch.long)
    for shape, given, out in (("one to one", tokens[:, 0], network.one_to_one(tokens[:, 0])),
                              ("one to many", tokens[:, 0], network.one_to_many(tokens[:, 0], 4)),
                              ("many to one", tokens, network.many_to_one(tokens)),
                              ("many to many", tokens, network.many_to_many(tokens))):
        print(f"{shape:12} {tuple(given.shape)} -> {tuple(out.shape)}")

    x = torch.randn(batch, distance + 1, d_model, generator=generator)
    layers = {cell: Recurrent(d_model, d_model, cell, generator=generator) for cell in CELLS}
    layers["lstm, forget bias 3"] = Recurrent(d_model, d_model, "lstm", generator=generator, forget_bias=3.0)
    norms = {name: gradient_by_distance(layer, x) for name, layer in layers.items()}
    shown = sorted({round(distance * quarter / 4) for quarter in range(5)})
    print("\nhow much of the gradient is left so many steps back, untrained\n"
          f"{'':20}" + "".join(f"{k:>9}" for k in shown))
    for name, values in norms.items():
        print(f"{name:20}" + "".join(f"{values[k] / values[0]:9.0e}" for k in shown))
    if plot is not None:
        _draw(figure, plot, norms)
    rnn, lstm, remembering = (norms[name][-1] / norms[name][0] for name in ("rnn", "lstm", "lstm, forget bias 3"))
    print(f"\nleft after {distance} steps: rnn {rnn:.0e}, lstm {lstm:.0e}, lstm with open gates {remembering:.0e}, "
          f"each above the one before: {bool(rnn < lstm < remembering)} (expected True, from ten steps on)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--d_model", type=int, default=64, help="width of inputs and states (default %(default)s)")
    parser.add_argument("--distance", type=int, default=40,
                        help="steps between input and output (default %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="sequences to average over (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and inputs (default %(default)s)")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the gradients by distance (needs matplotlib)")
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: not enough memory
        parser.error(str(error).split("\n")[0][:200])
