"""Random numbers that belong to an image: the same alone or in a batch, on every device. B images, G numbers of each.

A hash of the pixels, in whole numbers: sums of floats would depend on the batch they are computed in, and the same image
could get two routes. No multiply-adds of the net's kind. Ours.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

PRIME = 2_147_483_647  # 2^31 - 1
FAR = 1 << 16
Whole = TypeVar("Whole", int, Tensor)


def image_hash(x_BCHW: Tensor) -> Tensor:
    """A 31-bit whole number for each image."""
    levels_BN = (x_BCHW.flatten(1) * 64).round().long()
    weights_N = torch.arange(1, levels_BN.shape[1] + 1, device=x_BCHW.device) * 2_654_435_761 % PRIME
    return (levels_BN * weights_N).sum(1) % PRIME


def draws(hash_B: Tensor, u: int, parts: int) -> Tensor:
    """(B, G) uniform numbers in [0, 1), others for each u."""
    step_G = torch.arange(u * 64, u * 64 + parts, device=hash_B.device)
    step_G[64:] += FAR + u * FAR  # where the next unit's do not lie
    return _mixed(hash_B[:, None], step_G).double() / PRIME


def draw_each(hash_B: Tensor, u: int) -> list[float]:
    """The first of `draws` for each image, as Python's numbers: a few operations less, which count for an image alone."""
    return [_mixed(number, u * 64) / PRIME for number in hash_B.tolist()]


def _mixed(number: Whole, step: Whole) -> Whole:
    """Two rounds of multiply-and-mix, exact on every device."""
    number = (number + (step + 1) * 1_640_531_527) % PRIME
    for factor in (48_271, 69_621):  # multipliers of well-tested Lehmer generators modulo 2^31 - 1
        number = (number ^ (number >> 15)) * factor % PRIME
    return number
