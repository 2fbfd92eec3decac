"""How the channels of a plain block are shared out among sub-blocks when its weights are imported. The rules are ours.

G sub-blocks, C hidden channels of the plain block, I inputs and O outputs of a sub-block's convolution, k pixels of a kernel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from dynroute.units.ranking import contribution, rectified


def dealt(order: Tensor, parts: int) -> Tensor:
    """Channels, best first, dealt to sub-blocks in turn, so that these start equally good."""
    return torch.cat([order[g::parts] for g in range(parts)])


def shared_out(
    weight: Tensor, norm: Mapping[str, Tensor], sizes: Sequence[int], convs: nn.ModuleList, norms: nn.ModuleList
) -> None:
    """A dense last convolution, cut by its inputs, and its BatchNorm, whose mean and bias are shared out evenly."""
    for part, conv, own in zip(weight.split(list(sizes), 1), convs, norms, strict=True):
        cast(nn.Conv2d, conv).weight.copy_(part)
        for key, value in norm.items():
            getattr(own, key).copy_(value / len(sizes) if key in ("bias", "running_mean") else value)


def taken(order: Tensor, sizes: Sequence[int], rank: str) -> list[Tensor]:
    """Which channels each sub-block takes, given all of them, best first: those it is dealt, then the best of the others.

    A sub-block with more room than there are channels begins again; one with less room leaves out the last ones it was
    dealt. rank none: dealt in runs, and the others taken in their order.
    """
    hands = (order if rank == "none" else dealt(order, len(sizes))).tensor_split(len(sizes))
    return [
        repeated(torch.cat([hand, order[~torch.isin(order, hand)]]), size)
        for hand, size in zip(hands, sizes, strict=True)
    ]


def repeated(order: Tensor, size: int) -> Tensor:
    """The first `size` entries, from the beginning again where there are fewer."""
    return order.repeat(-(-size // len(order)))[:size]


def copies(channels: Tensor, of: int) -> Tensor:
    """How often the channel in each place was taken. of: how many channels there are."""
    return torch.bincount(channels, minlength=of)[channels]


def thinned(
    middle_OCkk: Tensor, norm1: Mapping[str, Tensor], norm2: Mapping[str, Tensor], size: int, rank: str, own: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(inputs, kernel, BatchNorm after it) of a sub-block that has room for `size` inputs of its convolution.

    middle_OCkk, norm2: the plain convolution and BatchNorm at this sub-block's outputs; norm1: the BatchNorm before it; own:
    numbers of the outputs, which rank none takes as inputs too. Else they are those of most use to these outputs.

    What was left out had a mean, which goes from the running mean (borders aside), and a variance: the running variance is
    multiplied by the part that remains, inputs and pixels taken as independent. So training starts from about the statistics
    that it will find.
    """
    gamma, beta = norm1["weight"], norm1["bias"]
    use_C = contribution(middle_OCkk, gamma, beta)
    inputs = repeated(own if rank == "none" else use_C.argsort(descending=True, stable=True), size)
    kernel = middle_OCkk[:, inputs] / copies(inputs, len(gamma))[:, None, None]
    mean_C, square_C = rectified(gamma, beta)
    variance_OC = middle_OCkk.square().sum((2, 3)) * (square_C - mean_C.square()).clamp(min=0)
    there_C = torch.zeros_like(gamma).index_fill_(0, inputs, 1)
    left = dict(norm2)
    left["running_mean"] = norm2["running_mean"] - middle_OCkk.sum((2, 3)) @ (mean_C * (1 - there_C))
    left["running_var"] = norm2["running_var"] * ((variance_OC @ there_C) / variance_OC.sum(1).clamp(min=1e-30))
    return inputs, kernel, left
