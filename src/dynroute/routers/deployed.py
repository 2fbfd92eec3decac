"""The Q-agent where nothing is learned any more: the same decisions from a few operations a unit.

Of a trained agent all is known but the feature maps and what it decided before. So BatchNorm goes into the encoder's weights;
charge and price into the biases of encoder and decoder, once for each price; what was told of the unit before into one bias
of the encoder for each action there. Ours.
B images, U units, G parts, A actions, C channels, D hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from dynroute.contracts import Decision
from dynroute.routers.base import Router

if TYPE_CHECKING:
    from dynroute.routers.qlearn import QRouter

PRICES = 64  # of which biases are kept: more than a calibration asks for


class Biases(NamedTuple):
    """At one price, of each unit. code: of the encoder, (1, D), or (A, D) by the action of the unit before; q: of the decoder."""

    code: tuple[Tensor, ...]
    q: tuple[Tensor, ...]


class Memory(NamedTuple):
    """State of the agent. action_B: of the unit before; None: there is none."""

    biases: Biases
    h_BD: Tensor
    c_BD: Tensor
    action_B: Tensor | None


class DeployedAgent(Router):
    """Decides as `source` does in eval(), by a copy of its weights: what becomes of those later does not reach it.

    Images of one call share a price, as the groups of `Router.start` do.
    """

    pooled = True

    @torch.no_grad()
    def __init__(self, source: QRouter) -> None:
        super().__init__(source.specs)
        self.source = copy.deepcopy(source).eval()
        self.lock = Lock()
        self.biases: dict[float, Biases] = {}
        agent, parts = self.source.agent, range(len(self.specs))
        self.keeps = [self.source.get_buffer(f"keep_{u}") for u in parts]
        self.encoders, self.first_biases = [], []  # (C, D) and (D,), BatchNorm folded in
        for encoder, norm in zip(_linear(agent.encoders), self.source.norms, strict=True):
            assert isinstance(norm, nn.BatchNorm1d)
            assert norm.running_mean is not None and norm.running_var is not None
            scale_C = (norm.running_var.double() + norm.eps).rsqrt()
            weight_DC = encoder.weight[:, : len(scale_C)].double() * scale_C
            self.encoders.append(weight_DC.T.float().contiguous())
            self.first_biases.append((encoder.bias.double() - weight_DC @ norm.running_mean.double()).float())
        self.decoders = [layer.weight.T.contiguous() for layer in _linear(agent.decoders)]
        self.cell = _cell(agent.cell)

    def begin(self, x_BCHW: Tensor) -> Memory:
        """Zero state, and the biases of the price that holds."""
        zero_BD = x_BCHW.new_zeros(len(x_BCHW), self.source.options.hidden, dtype=torch.float32)
        price = self.price
        return Memory(self.biases.get(price) or self._priced(price), zero_BD, zero_BD, None)

    def values(self, u: int, x_BCHW: Tensor, state: Memory) -> tuple[Tensor, Tensor, Tensor]:
        """What each action is worth less what it is charged, (B, A), and the next hidden state."""
        sum_BC = x_BCHW.sum((2, 3), dtype=torch.float32)
        bias = state.biases.code[u]
        if len(bias) > 1 and state.action_B is not None:
            bias = bias.index_select(0, state.action_B)
        pixels = x_BCHW.shape[2] * x_BCHW.shape[3]
        code_BD = torch.addmm(bias, sum_BC, self.encoders[u], alpha=1 / pixels).relu_()
        h_BD, c_BD = self.cell(code_BD, state.h_BD, state.c_BD)
        return torch.addmm(state.biases.q[u], h_BD, self.decoders[u]), h_BD, c_BD

    def decide(self, u: int, x_BCHW: Tensor, state: Memory) -> tuple[Decision, Memory]:
        """The best action. No notes."""
        q_BA, h_BD, c_BD = self.values(u, x_BCHW, state)
        action_B = q_BA.argmax(1)
        return Decision(self.keeps[u].index_select(0, action_B), {}), Memory(state.biases, h_BD, c_BD, action_B)

    def macs(self) -> float:
        """The agent's."""
        return self.source.macs()

    @torch.no_grad()
    def _priced(self, price: float) -> Biases:
        """All biases at a price, by the words of the plain agent."""
        with self.lock:
            source, agent = self.source, self.source.agent
            source.price = price
            asked = source.begin(self.encoders[0].new_zeros(1, 1, 1, 1))
            on_top = source.asked()[1]
            code, q = [], []
            encoders, decoders = _linear(agent.encoders), _linear(agent.decoders)
            for u, bias_D in enumerate(self.first_biases):
                spent_A = asked.charge_B * source.get_buffer(f"cost_{u}") if source.conditioned else 0.0
                q.append(decoders[u].bias - spent_A - on_top * source.get_buffer(f"share_{u}"))
                if source.conditioned:
                    ran_A = source.get_buffer(f"share_{u - 1}") if u else asked.ran_B
                    told_A2 = source.told_of(asked._replace(charge_B=asked.charge_B.expand_as(ran_A), ran_B=ran_A))
                    weight_D2 = encoders[u].weight[:, -source.told :]
                    code.append(bias_D + (told_A2[:, None] * weight_D2).sum(2))
                else:
                    code.append(bias_D[None])
            if len(self.biases) >= PRICES:
                self.biases.clear()
            self.biases[price] = Biases(tuple(code), tuple(q))
            return self.biases[price]


def _linear(layers: nn.ModuleList) -> list[nn.Linear]:
    """The layers, typed."""
    return [layer for layer in layers if isinstance(layer, nn.Linear)]


def _cell(cell: nn.RNNCellBase) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The recurrent cell as one call of PyTorch's: (x_BD, h_BD, c_BD) to (h_BD, c_BD)."""
    weights = (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
    if isinstance(cell, nn.LSTMCell):
        return lambda x_BD, h_BD, c_BD: torch.lstm_cell(x_BD, (h_BD, c_BD), *weights)
    one = torch.gru_cell if isinstance(cell, nn.GRUCell) else torch.rnn_tanh_cell
    return lambda x_BD, h_BD, c_BD: (one(x_BD, h_BD, *weights), c_BD)
