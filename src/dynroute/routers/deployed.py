"""Routers where nothing is learned any more: the same decisions from a few operations a unit.

Of a trained router all is known but the feature maps and what it decided before. So BatchNorm goes into the weights, and what
a price or target says into biases, once for each price. Of a Q-agent what it was told of the unit before is one bias of the
encoder for each action there. Ours.
B images, U units, G parts, A actions, C channels, D hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from threading import Lock
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynroute.contracts import Decision
from dynroute.routers.base import Router, legal

if TYPE_CHECKING:
    from dynroute.routers.gates import GateRouter
    from dynroute.routers.qlearn import QRouter

PRICES = 64  # of which biases are kept: more than a calibration asks for
Source = TypeVar("Source", bound=Router)


class Deployed(Router, Generic[Source]):
    """Decides as `source` does in eval(), by a copy of its weights: what becomes of those later does not reach it.

    Images of one call share a price, as the groups of `Router.start` do. Subclasses write `_priced` and `decide`.
    """

    pooled = True

    def __init__(self, source: Source) -> None:
        super().__init__(source.specs)
        self.source = copy.deepcopy(source).eval()
        self.lock = Lock()
        self.biases: dict[float, Any] = {}

    def macs(self) -> float:
        """The source's."""
        return self.source.macs()

    def at_price(self) -> Any:
        """What `_priced` makes of the price that holds, kept for when it holds again."""
        price = self.price
        known = self.biases.get(price)
        if known is None:
            with self.lock, torch.no_grad():
                self.source.price = price
                known = self._priced()
                if len(self.biases) >= PRICES:
                    self.biases.clear()
                self.biases[price] = known
        return known

    def _priced(self) -> Any:
        raise NotImplementedError("all biases at the source's price")


class Biases(NamedTuple):
    """At one price, of each unit. code: of the encoder, (1, D), or (A, D) by the action of the unit before; q: of the decoder."""

    code: tuple[Tensor, ...]
    q: tuple[Tensor, ...]


class Memory(NamedTuple):
    """State of the agent. action: of the unit before, (B,), or a number for an image alone; None: there is none."""

    biases: Biases
    h_BD: Tensor
    c_BD: Tensor
    action: Tensor | int | None


class DeployedAgent(Deployed["QRouter"]):
    """The Q-agent."""

    leading = True

    @torch.no_grad()
    def __init__(self, source: QRouter) -> None:
        super().__init__(source)
        agent, parts = self.source.agent, range(len(self.specs))
        self.keeps = [self.source.get_buffer(f"keep_{u}") for u in parts]
        self.rows = [keep_AG.split(1) for keep_AG in self.keeps]  # not to be written to: they are the keeps
        self.encoders, self.first_biases = [], []  # (C, D) and (D,), BatchNorm folded in
        for encoder, norm in zip(_linear(agent.encoders), self.source.norms, strict=True):
            scale_C, shift_C = _folded(norm)
            weight_DC = encoder.weight[:, : len(scale_C)].double()
            self.encoders.append((weight_DC * scale_C).T.float().contiguous())
            self.first_biases.append((encoder.bias.double() + weight_DC @ shift_C).float())
        self.decoders = [layer.weight.T.contiguous() for layer in _linear(agent.decoders)]
        self.cell = _cell(agent.cell)

    def begin(self, x_BCHW: Tensor) -> Memory:
        """Zero state, and the biases of the price that holds."""
        zero_BD = x_BCHW.new_zeros(len(x_BCHW), self.source.options.hidden, dtype=torch.float32)
        return Memory(self.at_price(), zero_BD, zero_BD, None)

    def values(self, u: int, x_BCHW: Tensor, state: Memory) -> tuple[Tensor, Tensor, Tensor]:
        """What each action is worth less what it is charged, (B, A), and the next hidden state."""
        sum_BC = x_BCHW.sum((2, 3), dtype=torch.float32)
        bias, action, weight_CD = state.biases.code[u], state.action, self.encoders[u]
        if sum_BC.shape[1] < len(weight_CD):  # zeros, not a smaller product: a decision costs what it is charged
            sum_BC = F.pad(sum_BC, (0, len(weight_CD) - sum_BC.shape[1]))
        if len(bias) > 1 and action is not None:
            bias = bias[action : action + 1] if isinstance(action, int) else bias.index_select(0, action)
        pixels = x_BCHW.shape[2] * x_BCHW.shape[3]
        code_BD = torch.addmm(bias, sum_BC, weight_CD, alpha=1 / pixels).relu_()
        h_BD, c_BD = self.cell(code_BD, state.h_BD, state.c_BD)
        return torch.addmm(state.biases.q[u], h_BD, self.decoders[u]), h_BD, c_BD

    def decide(self, u: int, x_BCHW: Tensor, state: Memory) -> tuple[Decision, Memory]:
        """The best action. No notes."""
        q_BA, h_BD, c_BD = self.values(u, x_BCHW, state)
        action_B = q_BA.argmax(1)
        if len(q_BA) == 1 and not torch.compiler.is_exporting():  # rows that are there cost less than gathers
            action = int(action_B)
            return Decision(self.rows[u][action], {}), Memory(state.biases, h_BD, c_BD, action)
        return Decision(self.keeps[u].index_select(0, action_B), {}), Memory(state.biases, h_BD, c_BD, action_B)

    def _priced(self) -> Biases:
        """All biases, by the words of the plain agent."""
        source, agent = self.source, self.source.agent
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
        return Biases(tuple(code), tuple(q))


class GateMemory(NamedTuple):
    """State of the controllers. biases: by unit, of features (D,) and of logits (2G,); h_BD: of the unit before."""

    biases: tuple[tuple[Tensor, Tensor], ...]
    h_BD: Tensor | None


class DeployedGates(Deployed["GateRouter"]):
    """DMNN's controllers."""

    @torch.no_grad()
    def __init__(self, source: GateRouter) -> None:
        super().__init__(source)
        source, units = self.source, range(len(self.specs))
        self.features, self.told, self.shifts = [], [], []  # (C, D); (D,) of what is told; (D,) of BatchNorm
        for u, feature in enumerate(_linear(source.features)):
            one_D = feature.weight.new_ones(len(feature.weight), dtype=torch.float64)
            scale_D, shift_D = (one_D, 0 * one_D) if source.norms is None else _folded(source.norms[u])
            weight_DC = feature.weight.double() * scale_D[:, None]
            self.features.append(weight_DC[:, : self.specs[u].in_channels].T.float().contiguous())
            self.told.append(weight_DC[:, self.specs[u].in_channels :].sum(1))
            self.shifts.append(shift_D)
        self.gates = [gate.weight.T.contiguous() for gate in _linear(source.gates)]
        previous = {int(u): layer.weight.T.contiguous() for u, layer in source.previous.items()}  # type: ignore[operator]
        self.previous = [previous.get(u) for u in units]

    def begin(self, x_BCHW: Tensor) -> GateMemory:
        """The biases of the price that holds."""
        return GateMemory(self.at_price(), None)

    def logits(self, u: int, x_BCHW: Tensor, state: GateMemory) -> tuple[Tensor, Tensor]:
        """(B, 2G), closed and open in turn, and the next hidden state. A gate is open where open exceeds closed."""
        sum_BC = x_BCHW.sum((2, 3), dtype=torch.float32)
        feature_D, logit_2G = state.biases[u]
        h_BD = torch.addmm(feature_D, sum_BC, self.features[u], alpha=1 / (x_BCHW.shape[2] * x_BCHW.shape[3])).relu_()
        previous_DD = self.previous[u]
        if previous_DD is not None and state.h_BD is not None:
            h_BD += torch.mm(state.h_BD, previous_DD).relu_()
        return torch.addmm(logit_2G, h_BD, self.gates[u]), h_BD

    def decide(self, u: int, x_BCHW: Tensor, state: GateMemory) -> tuple[Decision, GateMemory]:
        """The gates without noise. No notes."""
        closed_open, h_BD = self.logits(u, x_BCHW, state)
        keep_BG = (closed_open[:, 1::2] > closed_open[:, ::2]).float()
        return Decision(legal(keep_BG, self.specs[u]), {}), GateMemory(state.biases, h_BD)

    def _priced(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """All biases, by the words of the plain router: what it is told, and what is added to the open logits."""
        source, made = self.source, []
        memory = source.begin(self.features[0].new_zeros(1, 1, 1, 1))
        told, target = 0.0, 0.0
        if source.range is not None and memory.told_B is not None:
            told, target = float(source.range.heard(memory.told_B)), float(memory.told_B)
        for u, gate in enumerate(_linear(source.gates)):
            logit_2G = gate.bias.clone()
            logit_2G[1::2] -= source.asked()[1] * source.get_buffer(f"share_{u}")
            if source.range is not None:
                logit_2G[1::2] += source.slopes[u] * target
            made.append(((self.told[u] * told + self.shifts[u]).float(), logit_2G))
        return tuple(made)


def _folded(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """BatchNorm in eval() as y * scale + shift, in double."""
    assert isinstance(norm, nn.BatchNorm1d) and norm.running_mean is not None and norm.running_var is not None
    scale_C = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.affine:
        scale_C = scale_C * norm.weight.double()
    shift_C = -norm.running_mean.double() * scale_C
    return scale_C, shift_C + norm.bias.double() if norm.affine else shift_C


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
