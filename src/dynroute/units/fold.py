"""The last 1x1 convolutions and BatchNorms of N sub-blocks as one matrix product in training (ours; exact).

The batch statistics of y = W u follow from those of u: mean W mu, variance diag(W Cov W^T). So each sub-block's BatchNorm
folds into its W before the product, and the N outputs of single sub-blocks are never made. The derivative is written out
by hand: autograd's own walks over the feature maps twice as often.
B images, G sub-blocks, C their channels together, O output channels, M = B * height * width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST = 2  # pixels of a minibatch for each hidden channel, from which on the fold is the faster form (ours, measured)
TINY = 4  # pixels of a map up to which a matrix product is faster than a 1x1 convolution (ours, measured)
WIDE = 128  # channels on both sides from which on a 1x1 convolution is faster than a matrix product (ours, measured)
PIECE = 2**18  # numbers of a map that are multiplied and summed up in one go on a processor (ours)


def fold_pays(pixels: int, channels: int) -> bool:
    """Whether the fold is likely faster than the plain form: its work on weights is the same however few the pixels.

    pixels: of the whole minibatch. channels: hidden ones of all sub-blocks.
    """
    return pixels >= LEAST * channels


def forked_pointwise(x_BIHW: Tensor, conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """(a 1x1 convolution of x, x itself for the shortcut).

    Together their gradient is one product added to the shortcut's, where autograd would make two maps and a third, their
    sum; and oneDNN's backward pass to an input is slower than its forward pass or a matrix product.
    """
    return cast("tuple[Tensor, Tensor]", _Fork.apply(x_BIHW, conv.weight))


class _Fork(torch.autograd.Function):
    """(weight x, x)."""

    @staticmethod
    def forward(ctx: Any, x_BIHW: Tensor, weight_CI11: Tensor) -> tuple[Tensor, Tensor]:
        """Under autocast the convolution is in its precision."""
        ctx.save_for_backward(x_BIHW, weight_CI11)
        return F.conv2d(x_BIHW, weight_CI11), x_BIHW.view_as(x_BIHW)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of x and weight, computed in the convolution's precision."""
        (x_BIHW, weight_CI11), low = ctx.saved_tensors, grads[0].dtype
        dx_BIHW = _pointwise(grads[0], weight_CI11.flatten(1).T.to(low), grads[1].to(low))
        dweight_CI = _rows(grads[0]).T @ _rows(x_BIHW).to(low)
        return dx_BIHW.to(x_BIHW.dtype), dweight_CI.to(weight_CI11.dtype).view_as(weight_CI11)


def folded_sum(
    out_BOHW: Tensor, u_BCHW: Tensor, convs: nn.ModuleList, norms: nn.ModuleList, keep_BG: Tensor | None
) -> Tensor:
    """out + sum over sub-blocks of gate * BatchNorm(conv(u's own channels)), with batch statistics. keep_BG None: all open.

    Statistics are of all images, closed gates included, and running statistics are updated, as by the plain form
    (`paths.gated_sum`). Under autocast the products over feature maps are in u's precision, statistics in the weights'.
    """
    weight_OC = torch.cat([cast(nn.Conv2d, conv).weight.flatten(1) for conv in convs], 1)
    layers = [cast(nn.BatchNorm2d, norm) for norm in norms]
    gamma_GO, beta_GO = (torch.stack([getattr(norm, name) for norm in layers]) for name in ("weight", "bias"))
    sizes = [cast(nn.Conv2d, conv).in_channels for conv in convs]
    keep_BG = u_BCHW.new_ones(len(u_BCHW), len(sizes)) if keep_BG is None else keep_BG[:, : len(sizes)]
    with torch.autocast(u_BCHW.device.type, enabled=False):
        given = (out_BOHW.to(u_BCHW.dtype), u_BCHW, keep_BG.to(weight_OC.dtype), weight_OC, gamma_GO, beta_GO)
        y_BOHW, mean_GO, variance_GO = _Fold.apply(*given, sizes, layers[0].eps)
    count = u_BCHW.numel() // u_BCHW.shape[1]
    with torch.no_grad():
        for norm, mean_O, variance_O in zip(layers, mean_GO, variance_GO, strict=True):
            assert norm.running_mean is not None and norm.running_var is not None and norm.momentum is not None
            norm.running_mean.lerp_(mean_O, norm.momentum)
            norm.running_var.lerp_(variance_O * count / max(count - 1, 1), norm.momentum)
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked += 1
    return cast(Tensor, y_BOHW)


class _Fold(torch.autograd.Function):
    """(the sum, mean_GO, variance_GO of the sub-blocks' outputs before BatchNorm); statistics carry no gradient out."""

    @staticmethod
    def forward(
        ctx: Any,
        out_BOHW: Tensor,
        u_BCHW: Tensor,
        keep_BG: Tensor,
        weight_OC: Tensor,
        gamma_GO: Tensor,
        beta_GO: Tensor,
        sizes: list[int],
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """With S = Cov(u): variance = diag(W S W^T), scale = gamma / sqrt(variance + eps), bias = beta - W mu scale."""
        u_MC, owner_C = _rows(u_BCHW), torch.repeat_interleave(torch.tensor(sizes)).to(u_BCHW.device)
        low, high = u_BCHW.dtype, weight_OC.dtype
        mean_C = u_MC.mean(0, dtype=high)
        weights = weight_OC.split(sizes, 1)
        centred_MC = u_MC - mean_C  # before it is squared, or fp32 would cancel
        parts = centred_MC.split(sizes, 1)
        spread = [w @ (c.T @ c).div_(len(u_MC)) for w, c in zip(weights, parts, strict=True)]  # W S
        variance_GO = _each(lambda ws, w: (ws * w).sum(1), spread, weights).clamp_(min=0)
        mean_GO = _each(lambda w, mean: w @ mean, weights, mean_C.split(sizes))
        inverse_GO = (variance_GO + eps).rsqrt()
        scale_GO = gamma_GO * inverse_GO
        bias_GO = beta_GO - mean_GO * scale_GO
        folded_OC = (weight_OC * scale_GO[owner_C].T).to(low)
        used_BMC = (
            centred_MC.view(len(u_BCHW), -1, len(mean_C)) if low == high else None
        )  # memory that is there already
        mask_B1C = keep_BG[:, None, owner_C].to(low)
        gated_MC = torch.mul(u_MC.view(len(u_BCHW), -1, len(mean_C)), mask_B1C, out=used_BMC).flatten(0, 1)
        bias_BO11 = (keep_BG @ bias_GO)[:, :, None, None].to(low)
        y_BOHW = _pointwise(_maps(gated_MC, u_BCHW), folded_OC, out_BOHW, bias_BO11)
        ctx.save_for_backward(
            u_BCHW, gated_MC, keep_BG, weight_OC, folded_OC, torch.cat(spread, 1), owner_C, mean_C,
            mean_GO, gamma_GO, inverse_GO, bias_GO,
        )  # fmt: skip
        ctx.sizes = sizes
        ctx.mark_non_differentiable(mean_GO, variance_GO)
        return y_BOHW, mean_GO, variance_GO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of out, u, keep, weight, gamma and beta.

        d(W S W^T)_oo gives 2 dvariance W S to W and sum_o dvariance_o w_o w_o^T to S, and that 2/M (u - mu) dS to u.
        """
        (
            u_BCHW, gated_MC, keep_BG, weight_OC, folded_OC, spread_OC, owner_C, mean_C,
            mean_GO, gamma_GO, inverse_GO, bias_GO,
        ) = ctx.saved_tensors  # fmt: skip
        sizes, dy_MO, u_MC = ctx.sizes, _rows(grads[0]), _rows(u_BCHW)
        low, high = u_BCHW.dtype, weight_OC.dtype
        dfolded_OC, dgated_MC = (dy_MO.T @ gated_MC).to(high), _rows(_pointwise(grads[0], folded_OC.T))
        dy_BO = _sums(grads[0]).to(high)
        shape = (len(u_BCHW), -1, len(mean_C))
        dgated_BMC, u_BMC = dgated_MC.view(shape), u_MC.view(shape)
        few = (
            len(u_BCHW) if u_BCHW.is_cuda else max(PIECE // u_BMC[0].numel(), 1)
        )  # images whose product stays in the cache
        pieces = zip(dgated_BMC.split(few), u_BMC.split(few), strict=True)
        mine_BC = torch.cat([(d * u).sum(1, dtype=high) for d, u in pieces])
        dkeep_BG = dy_BO @ bias_GO.T + torch.stack([part.sum(1) for part in mine_BC.split(sizes, 1)], 1)
        dbias_GO = keep_BG.T @ dy_BO  # of bias_GO, and so of beta
        by_weight = _each(lambda d, w: (d * w).sum(1), dfolded_OC.split(sizes, 1), weight_OC.split(sizes, 1))
        dscale_GO = by_weight - dbias_GO * mean_GO
        dvariance_GO = -0.5 * dscale_GO * gamma_GO * inverse_GO**3
        dmean_GO = -dbias_GO * gamma_GO * inverse_GO
        dweight_OC = dfolded_OC.mul_((gamma_GO * inverse_GO)[owner_C].T)
        dweight_OC.addcmul_(spread_OC, dvariance_GO[owner_C].T, value=2).addcmul_(dmean_GO[owner_C].T, mean_C)
        weights = weight_OC.split(sizes, 1)
        dcov = [(w.T * d) @ w * (2 / len(u_MC)) for w, d in zip(weights, dvariance_GO, strict=True)]  # twice dS / M
        towards_mean = [w.T @ d / len(u_MC) for w, d in zip(weights, dmean_GO, strict=True)]
        const = [t - m @ d for t, m, d in zip(towards_mean, mean_C.split(sizes), dcov, strict=True)]
        mask_B1C, const_C = keep_BG[:, None, owner_C].to(low), torch.cat(const).to(low)
        du_MC = torch.addcmul(const_C, dgated_BMC, mask_B1C, out=dgated_BMC).flatten(0, 1)
        for du, u, d in zip(du_MC.split(sizes, 1), u_MC.split(sizes, 1), dcov, strict=True):
            du.addmm_(u, d.to(low))
        return grads[0], _maps(du_MC, u_BCHW), dkeep_BG, dweight_OC, (dscale_GO * inverse_GO), dbias_GO, None, None


def _pointwise(x_BIHW: Tensor, weight_OI: Tensor, *added: Tensor) -> Tensor:
    """weight x at each pixel, plus up to two things of that shape or spread over it; channels_last, by the faster library.

    oneDNN's convolutions beat matrix products but on tiny maps and few channels.
    """
    if min(weight_OI.shape) >= WIDE and x_BIHW.shape[2] * x_BIHW.shape[3] > TINY:
        y_BOHW = F.conv2d(x_BIHW.contiguous(memory_format=torch.channels_last), weight_OI[:, :, None, None])
        for more in added:  # shorter types are added faster to fresh memory than in place, fp32 the other way round
            y_BOHW = y_BOHW.add_(more) if y_BOHW.dtype == torch.float32 else y_BOHW.add(more)
        return y_BOHW
    if not added:
        return _maps(_rows(x_BIHW) @ weight_OI.T, x_BIHW)
    y_BOHW = (torch.add(*added) if len(added) > 1 else added[0].clone()).contiguous(memory_format=torch.channels_last)
    y_BOHW.permute(0, 2, 3, 1).view(-1, len(weight_OI)).addmm_(_rows(x_BIHW), weight_OI.T)
    return y_BOHW


def _sums(x_BCHW: Tensor) -> Tensor:
    """(B, C), over pixels, accumulated in fp32. As pooling on a processor, which is 7 times as fast there in bf16."""
    if x_BCHW.device.type != "cpu":
        return x_BCHW.sum((2, 3), dtype=torch.promote_types(x_BCHW.dtype, torch.float32))
    return F.avg_pool2d(x_BCHW, x_BCHW.shape[2:], divisor_override=1).flatten(1)


def _rows(x_BCHW: Tensor) -> Tensor:
    """Pixels by channels, (M, C): a view where x is channels_last."""
    return x_BCHW.permute(0, 2, 3, 1).flatten(0, 2)


def _maps(rows_MC: Tensor, like_BCHW: Tensor) -> Tensor:
    """The inverse of `_rows`: feature maps, channels_last, of as many images and pixels as others."""
    batch, _, height, width = like_BCHW.shape
    return rows_MC.view(batch, height, width, -1).permute(0, 3, 1, 2)


def _each(run: Any, *parts: Sequence[Tensor]) -> Tensor:
    """A function of each sub-block's own pieces, stacked."""
    return torch.stack([run(*mine) for mine in zip(*parts, strict=True)])
