"""What the Q-agent learns from: rewards of a minibatch, the targets that follow from them, the error (RNP, Algorithm 1).

B images, U units, A actions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from dynroute.contracts import Batch, Output
from dynroute.routers.base import classification_loss

if TYPE_CHECKING:
    from dynroute.routers.qlearn import RnpOptions


def next_values(notes: dict[str, Tensor], double: bool) -> Tensor:
    """(B, U), detached: what the best action of each unit is worth, by the slow copy where there is one.

    double: the best by the agent, its worth by the slow copy.
    """
    q_BUA = notes["q"].detach()
    valued_BUA = notes.get("slow", q_BUA)
    if double:
        return valued_BUA.gather(2, q_BUA.argmax(2, keepdim=True))[:, :, 0]
    return valued_BUA.max(2).values


def td_targets(value_BU: Tensor, reward_BU: Tensor, gamma: float, trace: float) -> Tensor:
    """Targets (B, U), detached: r_u + gamma [(1 - lambda) value_{u+1} + lambda target_{u+1}]; r_U alone at the end.

    lambda = 0 is the paper's one-step Q-learning. Larger ones carry the terminal reward faster through the units, at the
    price of the exploring policy's returns (Peng and Williams, 1996, without cutting the trace).
    """
    targets = [reward_BU[:, -1]]
    for u in range(reward_BU.shape[1] - 2, -1, -1):
        ahead_B = (1 - trace) * value_BU[:, u + 1] + trace * targets[-1]
        targets.append(reward_BU[:, u] + gamma * ahead_B)
    return torch.stack(targets[::-1], 1).detach()


def rewards(out: Output, batch: Batch, alpha: float | Tensor, loss_B: Tensor, baseline: bool) -> Tensor:
    """(B, U): charges of the actions, and at the end -alpha times that image's own loss.

    baseline: the teacher's own loss on that image is taken off: a constant of the image, so that with gamma = 1 the best
    actions stay what they are and the returns vary less.
    """
    reward_BU = out.trace.notes["reward"].clone()
    if baseline and batch.advice is not None:
        loss_B = loss_B - classification_loss(batch.advice.logits_BK, batch)
    reward_BU[:, -1] -= alpha * loss_B
    return reward_BU


def td_loss(out: Output, reward_BU: Tensor, options: RnpOptions) -> Tensor:
    """Mean squared (or Huber) TD error over images and units, in parts of the size of each image's returns (ours).

    Else images asked for cheap routes, whose charge is large, would drown the others.
    """
    notes = out.trace.notes
    taken_BU = notes["q"].gather(2, notes["action"][:, :, None])[:, :, 0]
    targets_BU = td_targets(next_values(notes, options.double_q), reward_BU, options.gamma, options.trace)
    if "size" in notes:
        taken_BU, targets_BU = taken_BU / notes["size"], targets_BU / notes["size"]
    return F.huber_loss(taken_BU, targets_BU) if options.td == "huber" else F.mse_loss(taken_BU, targets_BU)
