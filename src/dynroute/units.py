"""The routable units of a net, each with a masked run (training) and a really narrower run (inference).

B images, G parts, C channels, H W height and width, A widths. A unit is called with keep_BG in {0, 1}; None means dense.

Two contracts hold for every unit and are checked by `testing.check_unit`:
- the masked run of a pattern equals `narrow(pattern)`, a smaller module made of plain layers with the same weights;
- nothing kept is the pure shortcut, the bias of the last BatchNorm included.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynroute.contracts import Form, UnitSpec
from dynroute.cost import CostTerms, conv_macs

STATISTICS = ("weight", "bias", "running_mean", "running_var")  # of a BatchNorm
FEW = 8  # images of one width in a minibatch below which its batch statistics are too noisy to use (ours, measured)


class Unit(nn.Module):
    """What a backbone exposes. Subclasses set `spec` and `reads` and write the three methods.

    reads: the earlier unit whose kept parts are this one's only non-zero input (VGG chains); None elsewhere.
    """

    spec: UnitSpec
    reads: int | None = None

    def forward(self, x_BCHW: Tensor, keep_BG: Tensor | None = None) -> Tensor:
        """The masked run: everything is computed, parts not kept are exact zeros. None: dense."""
        raise NotImplementedError("a unit must write forward()")

    def narrow(self, keep: tuple[bool, ...], keep_in: tuple[bool, ...] | None = None) -> nn.Module:
        """A smaller module (eval mode, plain layers) that computes the same for images of this one pattern."""
        raise NotImplementedError("a unit must write narrow()")

    def cost_terms(self) -> CostTerms:
        """MACs by part, and by pairs of parts where a convolution shrinks on both sides."""
        raise NotImplementedError("a unit must write cost_terms()")


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


class WidthNorm(nn.Module):
    """A BatchNorm of its own for each width 1..A: statistics and affine, no MACs (Yu et al., Slimmable Networks, 2019).

    After a convolution whose input is partly masked, mean and variance depend on how much is kept; one shared BatchNorm
    would be wrong at every width but the mean one. Statistics of a width come from the images that took it; widths with
    fewer than FEW images in the minibatch use their running statistics.
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
            return self._one(y_BCHW, len(self.weight), self.training)
        row_B = (width_B - 1).clamp(min=0)
        if not self.training:
            scale_AC = self.weight * (self.running_var + self.eps).rsqrt()
            shift_AC = self.bias - self.running_mean * scale_AC
            scale, shift = (v[row_B, :, None, None].to(y_BCHW.dtype) for v in (scale_AC, shift_AC))
            return torch.addcmul(shift, y_BCHW, scale)
        return self._by_width(y_BCHW, row_B + 1)

    def at(self, width: int) -> nn.BatchNorm2d:
        """A plain BatchNorm2d (eval) with the values of one width."""
        norm = nn.BatchNorm2d(self.weight.shape[1], eps=self.eps).to(self.weight.device).eval()
        for name in STATISTICS:
            getattr(norm, name).data.copy_(getattr(self, name)[width - 1])
        return norm

    def _by_width(self, y_BCHW: Tensor, width_B: Tensor) -> Tensor:
        """Images sorted by width, one native BatchNorm for each run of them, and back into their order."""
        counts = torch.bincount(width_B, minlength=len(self.weight) + 1).tolist()
        if max(counts) == len(width_B):
            return self._one(y_BCHW, counts.index(len(width_B)), True)
        order_B = width_B.argsort(stable=True)
        inverse_B = order_B.argsort()
        runs = Reorder.apply(y_BCHW, order_B, inverse_B).split(counts)
        done = [self._one(run, w, counts[w] >= FEW) for w, run in enumerate(runs) if counts[w]]
        return Reorder.apply(torch.cat(done), inverse_B, order_B)

    def _one(self, y_BCHW: Tensor, width: int, batch_statistics: bool) -> Tensor:
        running = (self.running_mean[width - 1], self.running_var[width - 1])  # views: updated in place
        affine = (self.weight[width - 1], self.bias[width - 1])
        return F.batch_norm(y_BCHW, *running, *affine, batch_statistics, self.momentum, self.eps)


class Subsample(nn.Module):
    """Option-A shortcut (He et al., 2016): every stride-th pixel, new channels zero, split evenly before and after. No MACs."""

    def __init__(self, stride: int, before: int, after: int) -> None:
        super().__init__()
        self.stride, self.before, self.after = stride, before, after

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Subsampled and channel-padded x."""
        return F.pad(x_BCHW[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class Residual(nn.Module):
    """ReLU(shortcut + body): what a narrowed residual unit is made of. body None: the pure shortcut."""

    def __init__(self, shortcut: nn.Module, body: nn.Module | None) -> None:
        super().__init__()
        self.shortcut, self.body = shortcut, body

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """The unit's output for images of one pattern."""
        out = self.shortcut(x_BCHW)
        return F.relu(out if self.body is None else out + self.body(x_BCHW))


def make_shortcut(kind: str, in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Identity where shapes agree; else option A (subsample and zero-pad) or B (1x1 projection with BatchNorm)."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    if kind == "A":
        new = out_channels - in_channels
        return Subsample(stride, new // 2, new - new // 2)
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


def sliced_conv(conv: nn.Conv2d, outputs: slice, inputs: slice) -> nn.Conv2d:
    """A smaller convolution (no groups) with the weights of the given output and input channels."""
    weight = conv.weight.detach()[outputs, inputs]
    sizes: dict[str, Any] = {"kernel_size": conv.kernel_size, "stride": conv.stride, "padding": conv.padding}
    small = nn.Conv2d(weight.shape[1], weight.shape[0], bias=False, **sizes)
    small.weight.data = weight.clone(memory_format=torch.preserve_format)
    return small


def sliced_norm(norm: nn.BatchNorm2d, channels: slice) -> nn.BatchNorm2d:
    """A BatchNorm (eval) of some of the channels."""
    small = nn.BatchNorm2d(len(range(*channels.indices(norm.num_features))), eps=norm.eps)
    for name in STATISTICS:
        setattr(getattr(small, name), "data", getattr(norm, name).detach()[channels].clone())  # noqa: B010
    return small.to(norm.weight.device).eval()


def even_split(channels: int, parts: int) -> list[int]:
    """Sizes of `parts` nearly equal runs of channels, larger ones first."""
    return [channels // parts + (g < channels % parts) for g in range(parts)]


class BasicUnit(Unit):
    """A shared frame of the two basic-block units: 3x3 conv, BatchNorm, ReLU, 3x3 conv, BatchNorm, plus shortcut, ReLU.

    sizes: hidden channels of each part. in_size: height (= width) of the input, for the MAC count.
    """

    form: Form

    def __init__(
        self,
        name: str,
        in_channels: int,
        out_channels: int,
        stride: int,
        sizes: list[int],
        in_size: int,
        shortcut: str = "A",
        stage: int = 1,
        stages: int = 1,
    ) -> None:
        super().__init__()
        hidden = sum(sizes)
        self.sizes, self.out_channels = sizes, out_channels
        self.out_size = (in_size + stride - 1) // stride
        self.shortcut = make_shortcut(shortcut, in_channels, out_channels, stride)
        self.conv1 = nn.Conv2d(in_channels, hidden, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        shares = tuple(size / hidden for size in sizes)
        skippable = self.form != "nested"
        self.spec = UnitSpec(name, in_channels, len(sizes), self.form, skippable, shares, stage, stages)

    def cost_terms(self) -> CostTerms:
        """Both convolutions shrink with the hidden channels; a projection shortcut always runs."""
        first = conv_macs(self.out_size, 3, self.spec.in_channels, 1)
        second = conv_macs(self.out_size, 3, 1, self.out_channels)
        projection = isinstance(self.shortcut, nn.Sequential)
        always = conv_macs(self.out_size, 1, self.spec.in_channels, self.out_channels) if projection else 0
        return CostTerms(always, tuple(float(size * (first + second)) for size in self.sizes))


class GroupedBasic(BasicUnit):
    """Basic block whose hidden channels form G nested groups; keeping a groups computes the first a (RNP; RNR incremental).

    The mask goes after BatchNorm and ReLU: before them, BatchNorm would turn the zeros into non-zeros.
    """

    form: Form = "nested"

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.conv2 = nn.Conv2d(sum(self.sizes), self.out_channels, 3, 1, 1, bias=False)
        self.bn2 = WidthNorm(self.out_channels, len(self.sizes))

    def forward(self, x_BCHW: Tensor, keep_BG: Tensor | None = None) -> Tensor:
        """The masked run; keep_BG must be a prefix of ones."""
        u = F.relu(self.bn1(self.conv1(x_BCHW)))
        if keep_BG is None:
            return F.relu(self.shortcut(x_BCHW) + self.bn2(self.conv2(u), None))
        keep_BG = keep_BG[:, : len(self.sizes)]
        sizes = torch.tensor(self.sizes, device=keep_BG.device)
        mask_BC = keep_BG.repeat_interleave(sizes, dim=1, output_size=sum(self.sizes))
        u = u * mask_BC[:, :, None, None].to(u.dtype)
        y = self.bn2(self.conv2(u), keep_BG.detach().sum(1).long())
        anything_B111 = keep_BG[:, :1, None, None].to(y.dtype)  # a prefix that is not empty holds its first part
        return F.relu(self.shortcut(x_BCHW) + y * anything_B111)

    def narrow(self, keep: tuple[bool, ...], keep_in: tuple[bool, ...] | None = None) -> nn.Module:
        """The block with only its first kept groups of hidden channels."""
        kept = sum(keep)
        if kept == 0:
            return Residual(self.shortcut, None)
        hidden = slice(0, sum(self.sizes[:kept]))
        return Residual(
            self.shortcut,
            nn.Sequential(
                sliced_conv(self.conv1, hidden, slice(None)),
                sliced_norm(self.bn1, hidden),
                nn.ReLU(),
                sliced_conv(self.conv2, slice(None), hidden),
                self.bn2.at(kept),
            ),
        ).eval()


class PathBasic(BasicUnit):
    """Basic block split into N sub-blocks with a switch each, summed with the shared shortcut (DMNN, equation 4).

    Every convolution of every sub-block has its BatchNorm. The first convolutions run as one (their BatchNorms on the
    concatenated channels are the separate ones); the last ones run apart.
    """

    form: Form = "free"

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.conv2 = nn.ModuleList(nn.Conv2d(s, self.out_channels, 3, 1, 1, bias=False) for s in self.sizes)
        self.bn2 = nn.ModuleList(nn.BatchNorm2d(self.out_channels) for _ in self.sizes)

    def forward(self, x_BCHW: Tensor, keep_BG: Tensor | None = None) -> Tensor:
        """The masked run: shortcut + sum of gate times sub-block."""
        u = F.relu(self.bn1(self.conv1(x_BCHW)))
        out = self.shortcut(x_BCHW)
        for g, (part, conv, norm) in enumerate(zip(u.split(self.sizes, 1), self.conv2, self.bn2, strict=True)):
            y = norm(conv(part))
            out = out + (y if keep_BG is None else y * keep_BG[:, g, None, None, None].to(y.dtype))
        return F.relu(out)

    def narrow(self, keep: tuple[bool, ...], keep_in: tuple[bool, ...] | None = None) -> nn.Module:
        """The open sub-blocks as one block: concatenated, with each last BatchNorm folded into its convolution."""
        opened = [g for g in range(len(self.sizes)) if keep[g]]
        if not opened:
            return Residual(self.shortcut, None)
        starts = [sum(self.sizes[:g]) for g in opened]
        rows = torch.cat([torch.arange(s, s + self.sizes[g]) for s, g in zip(starts, opened, strict=True)])
        stride: Any = self.conv1.stride
        first = nn.Conv2d(self.spec.in_channels, len(rows), 3, stride, 1, bias=False).to(self.conv1.weight.device)
        first.weight.data = self.conv1.weight.detach()[rows]
        norm = nn.BatchNorm2d(len(rows), eps=self.bn1.eps).to(first.weight.device)
        for name in STATISTICS:
            getattr(norm, name).data = getattr(self.bn1, name).detach()[rows]
        last = nn.Conv2d(len(rows), self.out_channels, 3, 1, 1).to(first.weight.device)
        folded = [folded_conv(self.conv2[g], self.bn2[g]) for g in opened]  # type: ignore[arg-type]
        last.weight.data = torch.cat([weight for weight, _ in folded], 1)
        assert last.bias is not None
        last.bias.data = torch.stack([bias for _, bias in folded]).sum(0)
        return Residual(self.shortcut, nn.Sequential(first, norm, nn.ReLU(), last)).eval()


def folded_conv(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of one convolution that does conv, then norm, in eval mode."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight.detach() * (norm.running_var + norm.eps).rsqrt()
    return conv.weight.detach() * scale[:, None, None, None], norm.bias.detach() - norm.running_mean * scale


UNITS: dict[str, type[BasicUnit]] = {"channels": GroupedBasic, "paths": PathBasic}
