"""The contract of every routable unit, and the pieces that units are made of.

A unit has a masked run (training) and a really narrower run (inference).

B images, G parts, C channels, H W height and width, A widths. A unit is called with keep_BG in {0, 1}; None means dense.

Two contracts hold for every unit and are checked by `testing.check_unit`:
- the masked run of a pattern equals `narrow(pattern)`, a smaller module made of plain layers with the same weights;
- nothing kept is the pure shortcut, the bias of the last BatchNorm included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from dynroute.contracts import Form, InputError, UnitSpec
from dynroute.cost import CostTerms, conv_macs

STATISTICS = ("weight", "bias", "running_mean", "running_var")  # of a BatchNorm
FEW = 8  # images of one width in a minibatch below which its batch statistics are too noisy to use (ours, measured)


class Unit(nn.Module):
    """What a backbone exposes. Subclasses set `spec` and `reads` and write the three methods.

    reads: the earlier unit whose kept parts are this one's only non-zero input (chains such as VGG); None elsewhere. A unit
    that reads another is called with a third argument, above_BG: the keep of the unit it reads. None: all of it.
    additive: what a set of parts adds to the shortcut is the sum of what its subsets add; then `narrow` gives a `Residual`,
    and the fast run may take the parts in turns.
    """

    spec: UnitSpec
    reads: int | None = None
    additive: bool = False

    def forward(self, x_BCHW: Tensor, keep_BG: Tensor | None = None) -> Tensor:
        """The masked run: everything is computed, parts not kept are exact zeros. None: dense."""
        raise NotImplementedError("a unit must write forward()")

    def narrow(self, keep: tuple[bool, ...], keep_in: tuple[bool, ...] | None = None) -> nn.Module:
        """A smaller module (eval mode, plain layers) that computes the same for images of this one pattern."""
        raise NotImplementedError("a unit must write narrow()")

    def cost_terms(self) -> CostTerms:
        """MACs by part, and by pairs of parts where a convolution shrinks on both sides."""
        raise NotImplementedError("a unit must write cost_terms()")

    def load_dense(self, weights: Weights) -> None:
        """Take over the same block of the plain dense net. Raises InputError where names or shapes do not fit."""
        raise InputError(f"backbone.weights: units of the kind {type(self).__name__} cannot start from a plain net")

    def dense_state(self) -> dict[str, Tensor]:
        """The plain block's tensors under the names that `load_dense` reads. Raises InputError where there is none."""
        raise InputError(f"units of the kind {type(self).__name__} have no plain dense net to start from")


class Reorder(torch.autograd.Function):
    """Images in another order; the gradient is put back by the inverse order (index_select's own adds up, slowly)."""

    @staticmethod
    def forward(ctx: Any, x_BCHW: Tensor, order_B: Tensor, inverse_B: Tensor) -> Tensor:
        """x_BCHW[order_B]. Through the NHWC view: index_select on a channels_last tensor would fall back to NCHW."""
        ctx.save_for_backward(order_B, inverse_B)
        return x_BCHW.permute(0, 2, 3, 1).index_select(0, order_B).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """The gradient in the original order."""
        order_B, inverse_B = ctx.saved_tensors
        return Reorder.apply(grads[0], inverse_B, order_B), None, None


def by_group(x_BCHW: Tensor, group_B: Tensor, run: Callable[[int, Tensor, bool], Tensor]) -> Tensor:
    """Images sorted by group, each group's run through its own function, and back into their order.

    run: of (group, its images, whether they are enough for batch statistics: FEW of them, or all there are).
    """
    counts = torch.bincount(group_B).tolist()
    if max(counts) == len(group_B):
        return run(counts.index(len(group_B)), x_BCHW, True)
    order_B = group_B.argsort(stable=True)
    inverse_B = order_B.argsort()
    parts = Reorder.apply(x_BCHW, order_B, inverse_B).split(counts)
    done = [run(group, part, len(part) >= FEW) for group, part in enumerate(parts) if len(part)]
    del parts
    merged = torch.cat(done)
    done.clear()  # here memory is at its peak, and autograd does not keep these
    return Reorder.apply(merged, inverse_B, order_B)


class WidthNorm(nn.Module):
    """A BatchNorm of its own for each width 1..A: statistics and affine, no MACs (Yu et al., Slimmable Networks, 2019).

    After a convolution whose input is partly masked, mean and variance depend on how much is kept; one shared BatchNorm
    would be wrong at every width but the mean one. Statistics of a width come from the images that took it; see `normalised`.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, widths: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(widths, channels))
        self.bias = nn.Parameter(torch.zeros(widths, channels))
        self.register_buffer("running_mean", torch.zeros(widths, channels))
        self.register_buffer("running_var", torch.ones(widths, channels))

    def forward(self, y_BCHW: Tensor, width_B: Tensor | None) -> Tensor:
        """Normalise each image by its own width (1..A); None: all at the full width. Width 0 is left to the caller."""
        if width_B is None:
            return self.run(y_BCHW, len(self.weight))
        row_B = (width_B - 1).clamp(min=0)
        if not self.training:
            scale_AC = self.weight * (self.running_var + self.eps).rsqrt()
            shift_AC = self.bias - self.running_mean * scale_AC
            scale, shift = (v[row_B, :, None, None].to(y_BCHW.dtype) for v in (scale_AC, shift_AC))
            return torch.addcmul(shift, y_BCHW, scale)
        return by_group(y_BCHW, row_B + 1, lambda w, run_BCHW, enough: self._one(run_BCHW, w, enough))

    def run(self, y_BCHW: Tensor, width: int) -> Tensor:
        """Normalise images that all have one width."""
        return self._one(y_BCHW, width, True)

    def at(self, width: int) -> nn.BatchNorm2d:
        """A plain BatchNorm2d (eval) with the values of one width."""
        norm = nn.BatchNorm2d(self.weight.shape[1], eps=self.eps).to(self.weight.device).eval()
        for name in STATISTICS:
            getattr(norm, name).data.copy_(getattr(self, name)[width - 1])
        return norm

    def _one(self, y_BCHW: Tensor, width: int, enough: bool) -> Tensor:
        running = (self.running_mean[width - 1], self.running_var[width - 1])  # views: updated in place
        affine = (self.weight[width - 1], self.bias[width - 1])
        return normalised(y_BCHW, running, affine, self.training, enough, self.momentum, self.eps)


def normalised(
    y_BCHW: Tensor,
    running: tuple[Tensor, Tensor],
    affine: tuple[Tensor, Tensor],
    training: bool,
    enough: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """BatchNorm of those images of a minibatch that take one width; mean and variance (C,) in `running` learn in training.

    Where there are enough of them (see `by_group`) they are normalised by their own statistics; else by the running ones, which
    then learn from them in proportion to their number: small minibatches, or many widths, never have enough. Ours.
    """
    if enough or not training:
        return F.batch_norm(y_BCHW, *running, *affine, training, momentum, eps)
    mean_C, var_C = (value.clone() for value in running)  # autograd keeps these
    seen_BCHW = y_BCHW.detach().to(mean_C.dtype)
    off_BCHW = seen_BCHW - mean_C[:, None, None]  # around their own mean a few images lie too close together
    for value, seen in zip(running, (seen_BCHW.mean((0, 2, 3)), off_BCHW.square().mean((0, 2, 3))), strict=True):
        value.data.lerp_(seen, momentum * len(y_BCHW) / FEW)  # as F.batch_norm does: autograd counts no change
    return F.batch_norm(y_BCHW, mean_C, var_C, *affine, False, momentum, eps)


class Subsample(nn.Module):
    """Option-A shortcut (He et al., 2016): every stride-th pixel, new channels zero, split evenly before and after. No MACs."""

    def __init__(self, stride: int, before: int, after: int) -> None:
        super().__init__()
        self.stride, self.before, self.after = stride, before, after

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Subsampled and channel-padded x.

        By pooling of one pixel: the gradient of a slice would come back as NCHW, and slow down all that it is added to.
        """
        return F.pad(F.avg_pool2d(x_BCHW, 1, self.stride), (0, 0, 0, 0, self.before, self.after))


class Residual(nn.Module):
    """shortcut + body, then ReLU unless the block ends linearly: what a narrowed unit with a shortcut is made of.

    body None: the pure shortcut.
    """

    def __init__(self, shortcut: nn.Module, body: nn.Module | None, relu: bool = True) -> None:
        super().__init__()
        self.shortcut, self.body, self.relu = shortcut, body, relu

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """The unit's output for images of one pattern."""
        out: Tensor = self.shortcut(x_BCHW)
        if self.body is not None:
            out = out + self.body(x_BCHW)
        return F.relu(out) if self.relu else out


@dataclass(frozen=True)
class Place:
    """Where a block stands in a net and what it must fit there, however it is made and cut.

    in_size: height (= width) of its input, for the MAC count. option: of the shortcut where shapes change, A or B.
    stage: from 1, of stages.
    """

    name: str
    in_channels: int
    out_channels: int
    stride: int
    in_size: int
    option: str = "B"
    stage: int = 1
    stages: int = 1

    @property
    def out_size(self) -> int:
        """Height (= width) of the output."""
        return (self.in_size + self.stride - 1) // self.stride

    @property
    def keeps_shape(self) -> bool:
        """Whether the output has the shape of the input."""
        return self.stride == 1 and self.in_channels == self.out_channels

    def shortcut(self) -> nn.Module:
        """Identity where shapes agree; else option A (subsample and zero-pad) or B (1x1 projection with BatchNorm)."""
        if self.keeps_shape:
            return nn.Identity()
        if self.option == "A":
            new = self.out_channels - self.in_channels
            return Subsample(self.stride, new // 2, new - new // 2)
        projection = nn.Conv2d(self.in_channels, self.out_channels, 1, self.stride, bias=False)
        return nn.Sequential(projection, nn.BatchNorm2d(self.out_channels))

    def shortcut_macs(self) -> int:
        """Multiply-adds of the shortcut, which always runs."""
        free = self.keeps_shape or self.option == "A"
        return 0 if free else conv_macs(self.out_size, 1, self.in_channels, self.out_channels)

    def spec(self, form: Form, shares: tuple[float, ...], skippable: bool) -> UnitSpec:
        """What a router is told of a unit of so many parts here; shares: of the unit's multiply-adds."""
        return UnitSpec(self.name, self.in_channels, len(shares), form, skippable, shares, self.stage, self.stages)


def channel_mask(keep_BG: Tensor, sizes: Sequence[int]) -> Tensor:
    """keep_BG spread over the channels of its parts, to multiply feature maps with: (B, C, 1, 1). sizes: channels by part."""
    sizes_G = torch.tensor(sizes, device=keep_BG.device)
    return keep_BG.repeat_interleave(sizes_G, dim=1, output_size=sum(sizes))[:, :, None, None]


def masked(x_BCHW: Tensor, mask_BC11: Tensor, relu: Callable[[Tensor], Tensor] = F.relu) -> Tensor:
    """relu(x) times a mask of zeros and ones; relu: ReLU or ReLU6, not in place.

    A mask that learns nothing goes before the ReLU, which is the same to the bit and leaves one feature map less to keep
    for the backward pass: where the mask is 0 so is the output, and there a ReLU passes no gradient. One that learns goes
    after it.
    """
    return relu(x_BCHW) * mask_BC11 if mask_BC11.requires_grad else relu(x_BCHW * mask_BC11)


def common_width(keep_BG: Tensor) -> int | None:
    """How many parts every image keeps, if all keep as many; else None."""
    width_B = keep_BG.sum(1)
    width = int(width_B[0])
    return width if bool((width_B == width).all()) else None


def sliced_conv(conv: nn.Conv2d, outputs: slice | Tensor, inputs: slice | Tensor) -> nn.Conv2d:
    """A smaller convolution with the weights of the given output and input channels, bias included.

    Depthwise (as many groups as channels), each output reads its own input alone: both slices must be the same.
    """
    weight, groups = conv.weight.detach()[outputs], 1
    if conv.groups == 1:
        weight = weight[:, inputs]
    else:
        assert conv.groups == conv.in_channels == conv.out_channels, "groups of several channels cannot be sliced"
        assert outputs is inputs or outputs == inputs, "a depthwise convolution reads the very channels that it writes"
        groups = len(weight)
    sizes: dict[str, Any] = {"kernel_size": conv.kernel_size, "stride": conv.stride, "padding": conv.padding}
    sizes |= {"bias": conv.bias is not None, "groups": groups}
    small = skip_init(nn.Conv2d, weight.shape[1] * groups, weight.shape[0], **sizes)
    small.weight.data = weight.clone(memory_format=torch.preserve_format)
    if conv.bias is not None and small.bias is not None:
        small.bias.data = conv.bias.detach()[outputs].clone()
    return small


def sliced_norm(norm: nn.BatchNorm2d, channels: slice | Tensor) -> nn.BatchNorm2d:
    """A BatchNorm (eval) of some of the channels."""
    small = nn.BatchNorm2d(len(norm.weight.detach()[channels]), eps=norm.eps)
    for name in STATISTICS:
        setattr(getattr(small, name), "data", getattr(norm, name).detach()[channels].clone())  # noqa: B010
    return small.to(norm.weight.device).eval()


def even_split(channels: int, parts: int) -> list[int]:
    """Sizes of `parts` nearly equal runs of channels, larger ones first."""
    return [channels // parts + (g < channels % parts) for g in range(parts)]


def folded_conv(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of one convolution that does conv, then norm, in eval mode."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight.detach() * (norm.running_var + norm.eps).rsqrt()
    return conv.weight.detach() * scale[:, None, None, None], norm.bias.detach() - norm.running_mean * scale


class Weights:
    """The tensors of a plain dense net, each taken once and checked; what is left over is an error too.

    under(prefix) looks at one block with the same bookkeeping. rank: how units order their channels, one of RANKS.
    """

    def __init__(
        self, state: Mapping[str, Tensor], prefix: str = "", left: set[str] | None = None, rank: str = "auto"
    ) -> None:
        self.state, self.prefix, self.rank = state, prefix, rank
        self.left = set(state) if left is None else left

    def under(self, prefix: str) -> Weights:
        """The same weights, seen from a block."""
        return Weights(self.state, f"{self.prefix}{prefix}.", self.left, self.rank)

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.state

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor of that name. Raises InputError if it is missing or of another shape."""
        full = self.prefix + name
        if full not in self.state:
            raise InputError(f"backbone.weights: no {full!r} in the file: not a plain net of this kind and depth")
        if self.state[full].shape != shape:
            got = tuple(self.state[full].shape)
            raise InputError(f"backbone.weights: {full} has shape {got}, this backbone needs {shape}")
        self.left.discard(full)
        return self.state[full]

    def statistics(self, name: str, channels: int) -> dict[str, Tensor]:
        """The four tensors of a BatchNorm."""
        return {key: self.take(f"{name}.{key}", channels) for key in STATISTICS}

    def copy(self, module: nn.Module, name: str) -> None:
        """Fill a plain layer (convolution, linear, BatchNorm) from the tensors of that name."""
        for key, target in tensors(module).items():
            target.copy_(self.take(f"{name}.{key}", *target.shape))

    def finish(self) -> None:
        """Raise InputError if a tensor of the file was not used."""
        if self.left:
            raise InputError(
                f"backbone.weights: {min(self.left)!r} has no place in this backbone: another depth, shortcut or net"
            )


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a plain layer by name: weight, bias and running statistics, as far as it has them."""
    found = {key: getattr(module, key, None) for key in STATISTICS}
    return {key: value for key, value in found.items() if value is not None}
