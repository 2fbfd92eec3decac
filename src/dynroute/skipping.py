"""The fast run: the same weights and routes as the masked net, with convolutions that are really smaller or absent.

Images of a minibatch are grouped by pattern, unit by unit; each pattern has its narrow module, BatchNorm folded, made once
and kept in a least-recently-used cache (slicing weights at every call is slower than the dense net).
B images, U units, G parts.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dynroute.contracts import Output
from dynroute.net import RoutedNet, stack

Key = tuple[int, tuple[bool, ...], tuple[bool, ...] | None]


class FastNet:
    """Inference with a trained RoutedNet; same logits to rounding, `cache` narrow modules at most.

    A snapshot: BatchNorm is folded when a pattern is first met, so make a new FastNet after changing weights.
    """

    def __init__(self, net: RoutedNet, cache: int = 512) -> None:
        self.net, self.cache = net.eval(), max(cache, 1)
        self.stem, self.head = folded(net.backbone.stem), folded(net.backbone.head)
        self.modules: OrderedDict[Key, nn.Module] = OrderedDict()

    @torch.inference_mode()
    def __call__(self, x_BCHW: Tensor, keep_BUG: Tensor | None = None) -> Output:
        """Logits, decisions and cost of each image; keep_BUG: these routes instead of the router's."""
        net = self.net
        journey = net.router.start(x_BCHW) if keep_BUG is None else None
        x_BCHW = self.stem(x_BCHW)
        keeps: list[Tensor] = []
        for u, unit in enumerate(net.backbone.routable):
            if keep_BUG is not None:
                keep_BG = keep_BUG[:, u, : unit.spec.parts]
            elif journey is not None:
                decision, journey = net.router.choose(u, x_BCHW, journey)
                keep_BG = decision.keep_BG
            above_BG = None if unit.reads is None else keeps[unit.reads]
            x_BCHW = self._unit(u, x_BCHW, keep_BG, above_BG)
            keeps.append(keep_BG)
        trace = stack(keeps, [{} for _ in keeps])
        return Output(self.head(x_BCHW), trace, net.cost(trace.keep_BUG))

    def _unit(self, u: int, x_BCHW: Tensor, keep_BG: Tensor, above_BG: Tensor | None) -> Tensor:
        """Run one unit, pattern by pattern."""
        rows = keep_BG.bool().tolist()
        above = [None] * len(rows) if above_BG is None else above_BG.bool().tolist()
        groups: dict[Key, list[int]] = {}
        for image, (own, read) in enumerate(zip(rows, above, strict=True)):
            groups.setdefault((u, tuple(own), None if read is None else tuple(read)), []).append(image)
        if len(groups) == 1:
            return self._narrow(next(iter(groups)))(x_BCHW)
        out_BCHW = None
        x_BHWC = x_BCHW.permute(0, 2, 3, 1)  # indexing a channels_last tensor would fall back to NCHW
        for key, images in groups.items():
            index = torch.tensor(images, device=x_BCHW.device)
            part = self._narrow(key)(x_BHWC.index_select(0, index).permute(0, 3, 1, 2))
            if out_BCHW is None:
                shape = (len(rows), *part.shape[1:])
                out_BCHW = torch.empty(shape, dtype=part.dtype, device=part.device, memory_format=torch.channels_last)
            out_BCHW.permute(0, 2, 3, 1).index_copy_(0, index, part.permute(0, 2, 3, 1))
        assert out_BCHW is not None
        return out_BCHW

    def _narrow(self, key: Key) -> nn.Module:
        """The folded narrow module of a pattern, from the cache."""
        if key not in self.modules:
            u, own, read = key
            self.modules[key] = folded(self.net.backbone.routable[u].narrow(own, read))
            while len(self.modules) > self.cache:
                self.modules.popitem(last=False)
        self.modules.move_to_end(key)
        return self.modules[key]


def folded(module: nn.Module) -> nn.Module:
    """A copy in eval mode in which every conv followed by a BatchNorm in a Sequential is one convolution."""
    children = {name: folded(child) for name, child in module.named_children()}
    if isinstance(module, nn.Sequential):
        return nn.Sequential(*_fuse(list(children.values()))).eval()
    copy = module.__new__(type(module))
    copy.__dict__ = module.__dict__ | {"_modules": dict(children)}
    return copy.eval() if children else module


def _fuse(layers: list[nn.Module]) -> list[nn.Module]:
    out: list[nn.Module] = []
    for layer in layers:
        if isinstance(layer, nn.BatchNorm2d) and out and isinstance(out[-1], nn.Conv2d):
            out[-1] = fuse_conv_bn_eval(out[-1].eval(), layer.eval())
        else:
            out.append(layer)
    return out
