"""One convolution of the fast run, its activation and a sum fused into it where the running PyTorch can.

PyTorch carries oneDNN convolutions whose weights are packed beforehand, made for its own compiler. They are private, so they
are tried once on small numbers, and used only where the right numbers come out.
N images, C channels, H W height and width.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RELU, RELU6 = "relu", "hardtanh"  # oneDNN's names
LIMITS: dict[str, list[float]] = {"none": [], RELU: [], RELU6: [0.0, 6.0]}
WORTH_PACKING = 3e6  # multiply-adds of a call below which a packed call's fixed 30-50 us outweigh its speed (measured),
HEAVY = 2e5  # unless there are so many weights, which a plain call would bring into order each time (measured)
CALL = 40e-6  # seconds that one more call of a convolution costs;
COPY = 6e9  # bytes a second that a gather moves, and
READ = 12e9  # that weights are read at: measured on two machines, within a factor of two (ours)
RATE = 4.5e10  # multiply-adds a second of a large convolution on one core (measured, 8 floats at a time; ours)


class Conv:
    """A convolution in eval mode, a BatchNorm folded in, then nothing, ReLU or ReLU6.

    packed: whether packed calls may be used; which one is used is settled by the size of the inputs. Weights are packed
    when that is first worth it, and replaces the plain weights.
    """

    def __init__(self, conv: nn.Conv2d, packed: bool) -> None:
        zeros = torch.zeros(conv.out_channels, device=conv.weight.device, dtype=conv.weight.dtype)
        self.bias = zeros if conv.bias is None else conv.bias.detach()
        # as the maps are: a plain call would turn weights of another format at every call, on small maps most of its time
        self.plain: Tensor | None = conv.weight.detach().contiguous(memory_format=torch.channels_last)
        self.act = "none"
        self.stride, self.dilation = list(conv.stride), list(conv.dilation)
        self.padding = [int(side) for side in conv.padding]
        self.groups, self.size = conv.groups, conv.weight.numel()
        self.may_pack = packed and conv.weight.is_cpu and conv.weight.dtype == torch.float32 and packed_works()
        self.packing: Tensor | None = None

    @property
    def bytes(self) -> int:
        """Memory of the weights."""
        return 4 * self.size

    def fold(self, norm: nn.BatchNorm2d) -> None:
        """Take in a BatchNorm (eval) that follows."""
        assert self.plain is not None and norm.running_mean is not None and norm.running_var is not None
        scale, kind = (norm.running_var.float() + norm.eps).rsqrt(), self.plain.dtype
        shift = -norm.running_mean.float() * scale
        if norm.affine:
            scale, shift = scale * norm.weight.detach(), shift * norm.weight.detach() + norm.bias.detach()
        self.plain = (self.plain * scale[:, None, None, None]).to(kind)
        self.bias = (self.bias * scale + shift).to(kind)

    def __call__(self, x_NCHW: Tensor) -> Tensor:
        """The convolution and its activation."""
        weight, is_packed = self._weight(x_NCHW)
        if is_packed:
            return _run(x_NCHW, weight, *self._rest(), self.act, LIMITS[self.act], "")
        return activated(self._convolved(x_NCHW, weight), self.act)

    def add_to(self, base_NCHW: Tensor, x_NCHW: Tensor, relu: bool) -> None:
        """base += the convolution, then ReLU if asked for; in place. Without the convolution's own activation."""
        weight, is_packed = self._weight(x_NCHW)
        if is_packed:
            _add(base_NCHW, x_NCHW, weight, *self._rest(), "add", 1.0, RELU if relu else None, [], "")
            return
        base_NCHW.add_(self._convolved(x_NCHW, weight))
        if relu:
            base_NCHW.relu_()

    def _rest(self) -> tuple[Any, ...]:
        return self.bias, self.padding, self.stride, self.dilation, self.groups

    def _convolved(self, x_NCHW: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x_NCHW, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def _weight(self, x_NCHW: Tensor) -> tuple[Tensor, bool]:
        """The weights for this input, and whether they are packed."""
        plain = self.plain  # read once: another thread may be packing
        if plain is None:
            assert self.packing is not None
            return self.packing, True
        images, _, height, width = x_NCHW.shape
        one = self.size * (height // self.stride[0]) * (width // self.stride[1])
        if not self.may_pack or (images * one < WORTH_PACKING and self.size < HEAVY):
            return plain, False
        # made for one image: the layout that oneDNN prefers hardly depends on how many there are
        packing = _pack(plain, self.padding, self.stride, self.dilation, self.groups, [1, *x_NCHW.shape[1:]])
        self.packing, self.plain = packing, None
        return packing, True


def activated(x_NCHW: Tensor, act: str) -> Tensor:
    """The activation, in place."""
    if act == RELU:
        return x_NCHW.relu_()
    return F.hardtanh_(x_NCHW, *LIMITS[RELU6]) if act == RELU6 else x_NCHW


def packable(conv: nn.Conv2d) -> bool:
    """Whether a convolution is one that `Conv` can do: zero padding, given in pixels."""
    return conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


def _run(*args: Any) -> Tensor:
    out: Tensor = torch.ops.mkldnn._convolution_pointwise.default(*args)
    return out


def _add(*args: Any) -> None:
    torch.ops.mkldnn._convolution_pointwise_.binary(*args)


def _pack(*args: Any) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight.default(*args)
    return packed


@functools.cache
def packed_works() -> bool:
    """Whether packed calls are there and give the numbers of plain ones: ReLU, ReLU6 and the sum, in place on a slice."""
    try:
        return _tried()
    except (RuntimeError, AttributeError, NotImplementedError, TypeError):  # another PyTorch, or one without oneDNN
        return False


@torch.inference_mode()
def _tried() -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, base = (
        torch.randn(s, generator=generator) for s in ((2, 8, 6, 6), (16, 8, 3, 3), (16,), (3, 16, 6, 6))
    )
    x, weight, base = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight, base))
    args = (_pack(weight, [1, 1], [1, 1], [1, 1], 1, [1, 8, 6, 6]), bias, [1, 1], [1, 1], [1, 1], 1)
    wanted = F.conv2d(x, weight, bias, padding=1)
    same = [
        torch.allclose(_run(x, *args, act, limits, ""), activated(wanted.clone(), act), atol=1e-4)
        for act, limits in LIMITS.items()
    ]
    summed = base.clone()
    summed[1:] = (summed[1:] + wanted).relu()
    _add(base[1:], x, *args, "add", 1.0, RELU, [], "")
    return all(same) and torch.allclose(base, summed, atol=1e-4)
