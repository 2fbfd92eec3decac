"""Which channels are the most useful: nested groups put them first when weights of a plain net are imported.

O output channels of the next layer, I input channels, C channels to be ranked, K taps of a kernel.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dynroute.contracts import InputError

RANKS = ("auto", "norm", "contribution", "none")


def best_first(rank: str, weight: Tensor, following: Tensor, norm: Mapping[str, Tensor] | None) -> Tensor:
    """Order (C,) of a layer's output channels, the most useful first, so that a prefix holds the best ones.

    rank: one of RANKS; none keeps the order as given; auto is contribution where a BatchNorm follows and norm elsewhere.
    weight: (C, I, ...) of the layer; following: (O, C, k, k) of the next one; norm: the BatchNorm's tensors in between.
    Raises InputError where contribution is asked for and there is no BatchNorm.
    """
    if rank == "none":
        return torch.arange(len(weight), device=weight.device)
    if rank == "norm" or (rank == "auto" and norm is None):
        return kernel_norm(weight).argsort(descending=True, stable=True)
    if norm is None:
        raise InputError("backbone.rank=contribution needs a BatchNorm after every ranked layer: choose norm or auto")
    return contribution(following, norm["weight"], norm["bias"]).argsort(descending=True, stable=True)


def kernel_norm(weight: Tensor) -> Tensor:
    """Mean L2 norm of the I kernels of each filter, (C,): how the authors of RNP rank (their code)."""
    return weight.flatten(2).norm(dim=2).mean(1)


def contribution(conv2: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """How much each hidden channel adds to a block's output: E[u^2] * |w_next|^2, shape (hidden,). Ours.

    u: see `rectified` (a ReLU6 clips a little more). The papers rank by the norm of the kernel (conv1), which says nothing
    once a BatchNorm rescales it.
    """
    return rectified(gamma, beta)[1] * conv2.square().sum((0, 2, 3))


def rectified(gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """E[u] and E[u^2] of u = ReLU(z), z ~ N(beta, gamma^2) after a BatchNorm: known without data. Shapes as gamma's."""
    sigma = gamma.abs().clamp(min=1e-12)
    ratio = beta / sigma
    normal = torch.distributions.Normal(0.0, 1.0)
    density, mass = normal.log_prob(ratio).exp(), normal.cdf(ratio)
    return beta * mass + sigma * density, (beta.square() + sigma.square()) * mass + beta * sigma * density
