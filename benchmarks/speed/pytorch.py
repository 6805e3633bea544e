"""Training windows in PyTorch, on one thread of the CPU, from the weights of a jtrunc model.

A helper of the questions that ask about peers: `torch` is None where PyTorch is not installed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from harness import optional

import jtrunc

torch = optional("torch")

PYTORCH = "PyTorch nn.LSTM"

Run = Callable[[], jtrunc.Params]
"""All windows of a call, always from the same weights and state; the weights that come out."""


class Network:
    """nn.LSTM of one or several layers and nn.Linear, with the weights of jtrunc's LSTM and readout.

    PyTorch has two biases a gate: the second stays at zero, so that both networks have the same parameters.
    """

    def __init__(self, params: jtrunc.Params, rate: float) -> None:
        torch.set_num_threads(1)
        self.stacked = isinstance(params.recurrent, tuple)
        layers = params.recurrent if self.stacked else (params.recurrent,)
        features, width = layers[0]["input_kernel"].shape[0], layers[0]["hidden_kernel"].shape[0]
        self.lstm = torch.nn.LSTM(features, width, num_layers=len(layers))
        self.readout = torch.nn.Linear(width, params.readout["bias"].shape[0])
        start = []
        for depth, theta in enumerate(layers):
            start += [theta["input_kernel"].T, theta["hidden_kernel"].T, theta["bias"]]
            second = getattr(self.lstm, f"bias_hh_l{depth}").requires_grad_(False)
            second.zero_()
        start += [params.readout["kernel"].T, params.readout["bias"]]
        self.start = [torch.from_numpy(np.array(leaf)) for leaf in start]
        every = [*self.lstm.parameters(), *self.readout.parameters()]
        self.trained = [parameter for parameter in every if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(self.trained, lr=rate)

    def reset(self) -> None:
        """Back to the weights given."""
        with torch.no_grad():
            for parameter, value in zip(self.trained, self.start, strict=True):
                parameter.copy_(value)

    def step(self, outputs: Any, targets: Any, scale: float) -> None:
        """A step of SGD on the cross-entropies of outputs (steps, B, width), summed and scaled."""
        logits = self.readout(outputs).flatten(0, 1)
        loss = scale * torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum")
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def weights(self) -> jtrunc.Params:
        """As jtrunc has them."""
        *leaves, kernel, bias = [parameter.detach().numpy() for parameter in self.trained]
        layers = tuple(
            {"input_kernel": inputs.T, "hidden_kernel": hidden.T, "bias": bias}
            for inputs, hidden, bias in zip(leaves[::3], leaves[1::3], leaves[2::3], strict=True)
        )
        return jtrunc.Params(layers if self.stacked else layers[0], {"kernel": kernel.T, "bias": bias})


def as_tensors(arrays: Any) -> Any:
    """Arrays as tensors, integers as the 64-bit ones that PyTorch's losses want."""

    def tensor(array: Any) -> Any:
        found = torch.from_numpy(np.array(array))
        return found if found.is_floating_point() else found.long()

    return jax.tree.map(tensor, arrays)


def training_windows(params: jtrunc.Params, hidden: Any, windows: Any, rate: float) -> Run:
    """Windows one after another, the state carried over: ``(x, targets)`` with axes (windows, steps, B).

    `hidden` is jtrunc's pair (c, h).
    """
    network = Network(params, rate)
    start = as_tensors([state[None] for state in hidden[::-1]])
    all_x, all_targets = as_tensors(windows)

    def run() -> jtrunc.Params:
        network.reset()
        hidden = tuple(start)
        for x, targets in zip(all_x, all_targets, strict=True):
            outputs, hidden = network.lstm(x, hidden)
            network.step(outputs, targets, 1 / x.shape[1])
            hidden = tuple(state.detach() for state in hidden)
        return network.weights()

    return run


def overlapping_windows(
    params: jtrunc.Params, hidden: Any, data: Any, rate: float, length: int, updates: int
) -> Run:
    """BPTT(2K, K) on a stream (steps, B): K steps of look-back, then K whose mean loss counts; then K on.

    `hidden` is one pair (c, h) for each layer.
    """
    network = Network(params, rate)
    start = as_tensors([np.stack(states) for states in zip(*hidden, strict=True)])[::-1]
    all_x, all_targets = as_tensors(data)

    def run() -> jtrunc.Params:
        network.reset()
        hidden = tuple(start)
        for first in range(0, updates * length, length):
            middle, last = first + length, first + 2 * length
            _, hidden = network.lstm(all_x[first:middle], hidden)
            outputs, _ = network.lstm(all_x[middle:last], hidden)
            network.step(outputs, all_targets[middle:last], 1 / (length * all_x.shape[1]))
            hidden = tuple(state.detach() for state in hidden)
        return network.weights()

    return run
