"""What a net does on a split, and the price that meets a FLOPs target.

B images, N images of a split, U units, G parts, K classes. A share is a part of the dense net's multiply-adds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dynroute.calibration import CLOSE, Calibration, Fit
from dynroute.contracts import Batch, Output, UnitSpec
from dynroute.net import RoutedNet


@dataclass
class Scores:
    """Per image: predicted_N, label_N, right_N, top5_N (bool), loss_N (cross entropy), macs_N, keep_NUG (uint8), index_N."""

    predicted_N: Tensor
    label_N: Tensor
    right_N: Tensor
    top5_N: Tensor
    loss_N: Tensor
    macs_N: Tensor
    keep_NUG: Tensor
    index_N: Tensor

    def macs_at(self, quantile: float) -> float:
        """A quantile of the multiply-adds per image."""
        return float(torch.quantile(self.macs_N, quantile))

    def routes(self) -> int:
        """Number of distinct routes."""
        return len(self.keep_NUG.flatten(1).unique(dim=0))

    def watched(self, specs: Sequence[UnitSpec]) -> dict[str, float]:
        """What shows whether routes collapse. executed: share of the parts that run, mean over units (e_l of DMNN's (11)).

        entropy: bits of a part's on or off over the images, mean over all parts: 0 where no part ever changes, 1 where each
        runs for half of the images. always_on, never_on: how many parts run for every image, for none.
        """
        rates = [self.keep_NUG[:, u, : spec.parts].double().mean(0) for u, spec in enumerate(specs)]
        rate = torch.cat(rates)
        entropy = -(torch.xlogy(rate, rate) + torch.xlogy(1 - rate, 1 - rate)) / math.log(2)
        return {
            "executed": float(torch.stack([r.mean() for r in rates]).mean()),
            "entropy": float(entropy.mean()) + 0.0,
            "always_on": int((rate == 1).sum()),
            "never_on": int((rate == 0).sum()),
        }


@torch.inference_mode()
def evaluate(
    net: RoutedNet,
    batches: Iterable[Batch],
    run: Callable[..., Output] | None = None,
    routes_NUG: Tensor | None = None,
) -> Scores:
    """Run the net in eval mode (no noise, no exploration) over batches on its device. run: another executor, as FastNet.

    routes_NUG: these routes instead of the router's; its row i is for the image of index i.
    """
    was_training = net.training
    net.eval()
    rows: list[tuple[Tensor, ...]] = []
    for batch in batches:
        given = () if routes_NUG is None else (routes_NUG[batch.index.cpu()].float().to(batch.images.device),)
        out = (run or net)(batch.images, *given)
        logits = out.logits_BK.float()
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = best == batch.labels[:, None]
        losses = F.cross_entropy(logits, batch.labels, reduction="none")
        keep = out.trace.keep_BUG.to(torch.uint8)
        macs = out.macs_B.expand(len(logits))
        rows.append((best[:, 0], batch.labels, hits[:, 0], hits.any(1), losses, macs, keep, batch.index))
    net.train(was_training)
    return Scores(*(torch.cat(column).cpu() for column in zip(*rows, strict=True)))


class Dial:
    """Searches the setting at which the mean share meets a target, on one split; every price is measured once.

    share_at(price): mean share and standard deviation of single images' shares. It need not be smooth or monotone (routers
    briefly trained are lumpy, and so are limited ones): between the two neighbours around the target in the calibration's
    chain the search bisects the first two prices tried whose shares lie on both sides of it, until one price meets it, or the
    neighbours are close, or no price lies between; then they are mixed.
    Prices are searched on an asinh scale, fine near 0 and coarse far out.
    """

    def __init__(
        self,
        share_at: Callable[[float], tuple[float, float]],
        limits: tuple[float, float],
        calibration: Calibration | None = None,
        images: int = 1,
    ) -> None:
        self.share_at, self.limits = share_at, limits
        self.calibration = calibration or Calibration(images)

    def find(self, target: float, tries: int = 24) -> Fit:
        """The setting for a target and the share to expect; out of reach, that of the nearest end."""
        known = self.calibration
        if target in known.searched:
            return known.searched[target]
        self.span()
        self._try(0.0)
        for _ in range(tries):
            if known.gap(target) <= CLOSE:
                break
            setting = known.fit(target).setting
            low, high = sorted((setting.price, setting.other))
            middle = self._between(low, high, target)
            if middle is None:
                break  # no price in between: a jump
            self._try(middle)
        known.searched[target] = known.fit(target)
        return known.searched[target]

    def _between(self, low: float, high: float, target: float) -> float | None:
        """A new price between two that were tried, from low to high, whose shares lie on both sides of the target; or None."""
        points = self.calibration.points
        for one, two in itertools.pairwise(sorted(price for price in points if low <= price <= high)):
            middle = _price((_scale(one) + _scale(two)) / 2)
            if (points[one].share - target) * (points[two].share - target) <= 0 and middle not in points:
                return middle
        return None

    def span(self) -> tuple[float, float]:
        """Lowest and highest share, the dial's end stops included."""
        for end in self.limits:
            self._try(end)
        return self.calibration.span()

    def _try(self, price: float) -> None:
        if price not in self.calibration.points:
            self.calibration.add(price, *self.share_at(price))


UNIT_PRICE = 1e-3  # prices below this are told apart linearly, above it by ratio


def _scale(price: float) -> float:
    return math.asinh(price / UNIT_PRICE)


def _price(scale: float) -> float:
    return UNIT_PRICE * math.sinh(scale)


def make_dial(
    net: RoutedNet, images: int, batches: Callable[[], Iterable[Batch]], calibration: Calibration | None = None
) -> Dial:
    """The dial of a net over so many (calibration) images, which are asked for when a price must be measured.

    Leaves the router's price where the last try put it. calibration: what is known already.
    """
    kept: list[Batch] = []

    @torch.inference_mode()
    def share_at(price: float) -> tuple[float, float]:
        if not kept:
            kept.extend(batches())
        net.eval()
        net.router.price = price
        share_N = torch.cat([net(batch.images).macs_B for batch in kept]) / net.cost.dense
        return float(share_N.mean()), float(share_N.std(unbiased=False))

    return Dial(share_at, net.router.price_limits, calibration, images)
