"""Routes for a net whose router is not trained: drawn outside the clock, found again by the images.

B images of a call, N images in all, U units, G parts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dynroute.contracts import Decision, UnitSpec
from dynroute.routers import Router, State, stacked
from dynroute.routers.static import RandomOptions, RandomRouter

NUMERAL = 256  # base in which `numbered` writes; bfloat16 too holds whole numbers up to it exactly


class Overruled(Router):
    """Asks a router, so that its time is spent, and runs given routes instead; for timing nets whose router is untrained.

    routes_NUG: by the number that `numbered` wrote into each image, so that any part of a batch finds its own.
    """

    routes_NUG: Tensor

    def __init__(self, router: Router, routes_NUG: Tensor) -> None:
        super().__init__(router.specs)
        self.router, self.price_limits = router, router.price_limits
        self.pooled, self.leading = router.pooled, router.leading
        self.register_buffer("routes_NUG", routes_NUG.float(), persistent=False)

    def begin(self, x_BCHW: Tensor) -> State:
        """The router's own state, and the routes of these images."""
        low_B, high_B = x_BCHW[:, 0, 0, 0].long(), x_BCHW[:, 0, 0, 1].long()
        return self.router.begin(x_BCHW), self.routes_NUG[low_B + NUMERAL * high_B]

    def decide(self, u: int, x_BCHW: Tensor, state: State) -> tuple[Decision, State]:
        """The given keep of unit u, after the router has said its own, which is a note."""
        inner, routes_BUG = state
        said, inner = self.router.decide(u, x_BCHW, inner)
        return Decision(routes_BUG[:, u, : self.specs[u].parts], {"unheard": said.keep_BG}), (inner, routes_BUG)

    def deployed(self) -> Overruled:
        """The same routes, a deployed router asked."""
        return Overruled(self.router.deployed(), self.routes_NUG)

    def macs(self) -> float:
        """The router's."""
        return self.router.macs()


class Opened(Router):
    """Asks a router, so that its time is spent, and runs all parts, or the dearest alternative, of every unit."""

    def __init__(self, router: Router, dense_UG: Tensor) -> None:
        super().__init__(router.specs)
        self.router, self.dense_UG = router, dense_UG
        self.pooled, self.leading = router.pooled, router.leading

    def begin(self, x_BCHW: Tensor) -> State:
        """The router's own."""
        return self.router.begin(x_BCHW)

    def decide(self, u: int, x_BCHW: Tensor, state: State) -> tuple[Decision, State]:
        """Everything, after the router has said its own."""
        _, state = self.router.decide(u, x_BCHW, state)
        return Decision(self.dense_UG[u, : self.specs[u].parts].expand(len(x_BCHW), -1), {}), state

    def deployed(self) -> Opened:
        """The same, a deployed router asked."""
        return Opened(self.router.deployed(), self.dense_UG)

    def macs(self) -> float:
        """The router's."""
        return self.router.macs()


def numbered(images_NCHW: Tensor) -> Tensor:
    """The images, each with its number in its first two pixels."""
    number_N = torch.arange(len(images_NCHW), device=images_NCHW.device)
    images_NCHW[:, 0, 0, 0] = (number_N % NUMERAL).to(images_NCHW.dtype)
    images_NCHW[:, 0, 0, 1] = (number_N // NUMERAL).to(images_NCHW.dtype)
    return images_NCHW


def uniform_routes(specs: Sequence[UnitSpec], images: int, seed: int = 0) -> Tensor:
    """keep_NUG in which each unit's keep is drawn evenly from its legal ones: RNP's uniform actions, for one."""
    drawing = torch.Generator().manual_seed(seed)
    keep_NUG = torch.zeros(images, len(specs), max(spec.parts for spec in specs))
    for u, spec in enumerate(specs):
        places_G = torch.arange(spec.parts)
        least = 0 if spec.skippable else 1
        if spec.form == "choice":
            keep_NG = places_G == torch.randint(spec.parts, (images, 1), generator=drawing)
        elif spec.form == "nested":
            keep_NG = places_G < torch.randint(least, spec.parts + 1, (images, 1), generator=drawing)
        else:
            number_N = torch.randint(1 << spec.parts, (images, 1), generator=drawing)
            number_N = number_N if spec.skippable else number_N | 1  # which holds the first part
            keep_NG = number_N >> places_G & 1
        keep_NUG[:, u, : spec.parts] = keep_NG.float()
    return keep_NUG


def random_routes(specs: Sequence[UnitSpec], images_NCHW: Tensor, rate: float) -> Tensor:
    """keep_NUG of router.name=random at a rate."""
    router = RandomRouter(specs, RandomOptions(rate)).eval()
    state = router.begin(images_NCHW)
    return stacked([router.decide(u, images_NCHW, state)[0].keep_BG.float() for u in range(len(specs))])
