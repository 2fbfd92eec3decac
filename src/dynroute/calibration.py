"""From a FLOPs target to a router's setting: what was measured on calibration images, and what follows from it. No torch.

A dial is measured at prices; each gives the mean share of the calibration images and how much single images differ. Among
the prices a chain is kept along which the share falls as the price rises. A target that a link of the chain meets gets that
price; one between two links gets both, mixed so that the expected share is the target. So the map is monotone: a higher
target never has a lower expected share. A target that was searched for keeps the setting that it then got, whatever is
measured later (so a row of eval.csv, `predict` and `export` are of one net).
A share is a part of the dense net's multiply-adds. All ours.
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dynroute.contracts import InputError, OutOfReach, Setting
from dynroute.records import BUDGET_FILE, locked, write_text

TOLERANCE = 0.02  # a target is missed when the reached share is further away
EXACT = 0.002  # a price whose share is as near as this is used alone
CLOSE = 0.01  # two prices whose shares are as near as this are mixed without a search for one in between
Z95 = 1.959964  # of the normal distribution, two-sided
FORMAT = 3  # of budget.json; the first had no spread, the second, which is read as well, one checkpoint alone
BROKEN = (ValueError, TypeError, KeyError, AttributeError, OSError)  # what a file of another make raises


class Point(NamedTuple):
    """A price, the mean share of the calibration images at it, and the standard deviation of single images' shares."""

    price: float
    share: float
    spread: float


@dataclass(frozen=True)
class Fit:
    """A setting and the share to expect of new images, with the ends of its 95 % interval (normal, of the mean)."""

    setting: Setting
    share: float
    low: float
    high: float


@dataclass
class Calibration:
    """The points measured so far, by price, over so many images; what targets that were searched for were given."""

    images: int
    points: dict[float, Point] = field(default_factory=dict)
    searched: dict[float, Fit] = field(default_factory=dict)

    def add(self, price: float, share: float, spread: float) -> None:
        """One more measured price."""
        self.points[price] = Point(price, share, spread)

    def chain(self) -> list[Point]:
        """The longest sequence of points along which the share never falls as the price falls, cheapest first."""
        best: list[list[Point]] = []  # the longest chain that ends in each point, dearest first
        for point in sorted(self.points.values()):
            before = [chain for chain in best if chain[-1].share >= point.share]
            best.append(max(([*chain, point] for chain in before), key=_length, default=[point]))
        return max(best, key=_length, default=[])[::-1]

    def span(self) -> tuple[float, float]:
        """The lowest and the highest share that the chain reaches."""
        chain = self.chain()
        return chain[0].share, chain[-1].share

    def fit(self, target: float) -> Fit:
        """The setting for a target; out of reach, that of the nearest end. Of prices with one share, the nearest to zero."""
        if target in self.searched:
            return self.searched[target]
        chain = self.chain()
        near = min(
            chain, key=lambda point: (round(abs(point.share - target), 12), abs(point.price))
        )  # less rounding errors
        place = bisect.bisect([point.share for point in chain], target)
        if abs(near.share - target) <= EXACT or place in (0, len(chain)):
            return self._expected(Setting(near.price), near, near, 0.0)
        cheap, dear = chain[place - 1], chain[place]
        part = (target - cheap.share) / (dear.share - cheap.share)
        return self._expected(Setting(cheap.price, dear.price, part), cheap, dear, part)

    def within_reach(self, target: float) -> Fit:
        """`fit`, or OutOfReach with the range."""
        fit, (low, high) = self.fit(target), self.span()
        if abs(fit.share - target) > TOLERANCE:
            raise OutOfReach(
                f"target {target:g} is out of reach: this net reaches {low:.3f} to {high:.3f} on calibration"
            )
        return fit

    def gap(self, target: float) -> float:
        """How far apart the shares are between which a target lies; 0 where one price meets it or nothing can."""
        setting = self.fit(target).setting
        return self.points[setting.other].share - self.points[setting.price].share if setting.part else 0.0

    def _expected(self, setting: Setting, one: Point, two: Point, part: float) -> Fit:
        share = (1 - part) * one.share + part * two.share
        squares = (1 - part) * (one.spread**2 + one.share**2) + part * (two.spread**2 + two.share**2)
        error = Z95 * math.sqrt(max(squares - share**2, 0.0) / max(self.images, 1))
        return Fit(setting, share, share - error, share + error)


def _length(chain: list[Point]) -> tuple[int, float]:
    """Points of a chain that begins dearest; of two as long, the one that reaches further."""
    return len(chain), chain[0].share - chain[-1].share


def read_budget(folder: Path, fingerprint: str, limit: float | None = None) -> Calibration | None:
    """What a run's budget.json holds for a limit on every image (None: without one); None where it holds nothing.

    fingerprint: of the checkpoint; what was measured with another one is not returned, nor is that of an older format. Raises
    InputError for a broken file.
    """
    try:
        content = _content(folder)
        for dial in content["dials"] if content.get("format") == FORMAT else ():
            if (dial["checkpoint"], dial["flops_max"]) == (fingerprint, limit):
                points = {float(row[0]): Point(*map(float, row)) for row in dial["points"]}
                return Calibration(int(dial["images"]), points, {float(t["target"]): _fit(t) for t in dial["targets"]})
    except BROKEN as error:
        raise InputError(
            f"{folder / BUDGET_FILE} is not a table of settings ({type(error).__name__}); delete it"
        ) from None
    return None


def outdated(folder: Path) -> bool:
    """Whether a run's budget.json is of an older format."""
    try:
        return _content(folder).get("format", FORMAT) != FORMAT or "settings" in _content(folder)
    except BROKEN:
        return False


def write_budget(
    folder: Path,
    fingerprint: str,
    calibration: Calibration,
    limit: float | None = None,
    standing: Collection[str] = (),
) -> None:
    """Store the points, dearest first, and the setting and expected share of each target searched for.

    Dials of other limits stay, those of other checkpoints that are `standing` (fingerprints of what the folder holds), and
    what another program has found for the same dial meanwhile.
    """
    made = {"checkpoint": fingerprint, "flops_max": limit, "images": calibration.images}
    points = {point.price: list(point) for point in calibration.points.values()}
    targets = {target: {"target": target, **_flat(fit)} for target, fit in calibration.searched.items()}
    with locked(folder):
        dials = []
        for dial in _dials(folder):
            if (dial["checkpoint"], dial["flops_max"]) != (fingerprint, limit):
                dials += [dial] if dial["checkpoint"] in {fingerprint, *standing} else []
            elif dial["images"] == calibration.images:
                points = {point[0]: point for point in dial["points"]} | points
                targets = {known["target"]: known for known in dial["targets"]} | targets
        own = {"points": sorted(points.values()), "targets": [targets[target] for target in sorted(targets)]}
        content = {"format": FORMAT, "dials": [*dials, {**made, **own}]}
        write_text(folder / BUDGET_FILE, json.dumps(content, indent=1) + "\n")


def _dials(folder: Path) -> list[dict[str, Any]]:
    """What budget.json holds now; nothing where it is missing, broken or of an older format."""
    try:
        content = _content(folder)
        dials = list(content["dials"]) if content.get("format") == FORMAT else []
        return [
            {key: dial[key] for key in ("checkpoint", "flops_max", "images", "points", "targets")} for dial in dials
        ]
    except BROKEN:
        return []


def _flat(fit: Fit) -> dict[str, float]:
    plain = asdict(fit)
    return {**plain.pop("setting"), **plain}


def _fit(flat: dict[str, Any]) -> Fit:
    setting = Setting(*(float(flat[key]) for key in ("price", "other", "part")))
    return Fit(setting, *(float(flat[key]) for key in ("share", "low", "high")))


def _content(folder: Path) -> dict[str, Any]:
    """The file as it is; empty where there is none."""
    path = folder / BUDGET_FILE
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if content.get("format") == 2:
        own = {name: content[name] for name in ("checkpoint", "images")}
        return {"format": FORMAT, "dials": [own | dial for dial in content["dials"]]}
    return content


def share_for_latency(points: Sequence[tuple[float, float]], ms: float) -> float:
    """The largest share at which an image takes at most so many milliseconds, linear between points of a latency table.

    points: share and milliseconds. Where noise has a dearer net run faster, the time of the cheaper one counts. Raises
    OutOfReach where even the cheapest is slower.
    """
    shares, slowest = _rising(points)
    if ms < slowest[0]:
        ends = f"{slowest[0]:.3g} to {slowest[-1]:.3g} ms"
        raise OutOfReach(f"{ms:g} ms an image is out of reach: the latency table has {ends}")
    place = bisect.bisect(slowest, ms) - 1
    if place + 1 == len(shares):
        return shares[place]
    part = (ms - slowest[place]) / (slowest[place + 1] - slowest[place])
    return shares[place] + part * (shares[place + 1] - shares[place])


def latency_for_share(points: Sequence[tuple[float, float]], share: float) -> float:
    """The milliseconds of a latency table at a share; beyond its ends those of the end."""
    shares, slowest = _rising(points)
    place = bisect.bisect(shares, share) - 1
    if not 0 <= place < len(shares) - 1:
        return slowest[0 if place < 0 else -1]
    part = (share - shares[place]) / (shares[place + 1] - shares[place])
    return slowest[place] + part * (slowest[place + 1] - slowest[place])


def _rising(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Shares in rising order, and the slowest time up to each."""
    timed = sorted(points)
    return [share for share, _ in timed], list(itertools.accumulate((time for _, time in timed), max))
