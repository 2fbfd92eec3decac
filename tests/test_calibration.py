"""From targets to settings: the chain, mixes and intervals by hand, monotone whatever was measured, and what is stored."""

from __future__ import annotations

import json
import math
from multiprocessing import Process
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dynroute.calibration import (
    EXACT,
    Calibration,
    latency_for_share,
    outdated,
    read_budget,
    share_for_latency,
    write_budget,
)
from dynroute.contracts import InputError, OutOfReach, Setting
from dynroute.measure import Dial

STEPS = [(-9.0, 1.0), (-0.5, 0.8), (0.0, 0.5), (0.5, 0.3), (9.0, 0.3)]


def calibration(rows: list[tuple[float, float]], spread: float = 0.1, images: int = 400) -> Calibration:
    made = Calibration(images)
    for price, share in rows:
        made.add(price, share, spread)
    return made


# --- targets to settings ----------------------------------------------------------------------------------------


def test_a_target_that_a_price_meets_gets_that_price() -> None:
    fit = calibration(STEPS).fit(0.501)
    assert fit.setting == Setting(0.0) and fit.share == 0.5
    half = 1.959964 * 0.1 / math.sqrt(400)
    assert (fit.low, fit.high) == pytest.approx((0.5 - half, 0.5 + half))


def test_a_target_between_two_prices_gets_both_by_hand() -> None:
    fit = calibration(STEPS).fit(0.6)
    assert (fit.setting.price, fit.setting.other, fit.setting.part) == pytest.approx((0.0, -0.5, 1 / 3))
    assert fit.share == pytest.approx(0.6)
    variance = 0.1**2 + (1 / 3) * (2 / 3) * 0.3**2  # within the two kinds of image, and between them
    assert fit.high - fit.share == pytest.approx(1.959964 * math.sqrt(variance / 400))


def test_the_trained_point_wins_among_prices_of_one_share() -> None:
    assert calibration([(-9.0, 0.5), (0.0, 0.5), (9.0, 0.5)]).fit(0.5).setting == Setting(0.0)
    assert calibration(STEPS).fit(0.3).setting == Setting(0.5)


def test_prices_against_the_order_are_left_out() -> None:
    rows = [*STEPS, (-0.2, 0.2), (0.2, 0.9)]  # cheaper than its dearer neighbours, and dearer than its cheaper ones
    assert [point.price for point in calibration(rows).chain()] == [9.0, 0.5, 0.0, -0.5, -9.0]


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(st.floats(-5, 5), st.floats(0.05, 1.1)), min_size=1, max_size=25),
    st.lists(st.floats(0.01, 1.0), min_size=2, max_size=12),
)
@example([(0.0, 0.05), (-1.0, 0.05000000000000001)], [1.0, 0.25])
def test_a_higher_target_never_expects_less(rows: list[tuple[float, float]], targets: list[float]) -> None:
    made = calibration(rows)
    fits = [made.fit(target) for target in sorted(targets)]
    shares = [fit.share for fit in fits]
    assert shares == sorted(shares)
    prices = [fit.setting.price for fit in fits]
    assert prices == sorted(prices, reverse=True)
    low, high = made.span()
    for target, fit in zip(sorted(targets), fits, strict=True):
        assert abs(fit.share - min(max(target, low), high)) <= EXACT + 1e-9
        assert 0 <= fit.setting.part < 1 and fit.low <= fit.share <= fit.high


def test_out_of_reach_is_said_with_the_range() -> None:
    made = calibration(STEPS)
    assert made.within_reach(0.29).share == 0.3  # missed by no more than is forgiven
    with pytest.raises(OutOfReach, match=r"0\.2 is out of reach: this net reaches 0\.300 to 1\.000"):
        made.within_reach(0.2)


# --- budget.json ------------------------------------------------------------------------------------------------


def test_what_is_stored_is_read_again_by_limit_and_checkpoint(tmp_path: Path) -> None:
    assert read_budget(tmp_path, "a") is None and not outdated(tmp_path)
    free, capped = calibration(STEPS), calibration(STEPS[2:])
    free.searched = {target: free.fit(target) for target in (0.6, 0.5)}
    write_budget(tmp_path, "a", free)
    write_budget(tmp_path, "a", capped, 0.7)
    write_budget(tmp_path, "a", free)
    assert read_budget(tmp_path, "a") == free and read_budget(tmp_path, "a", 0.7) == capped
    assert read_budget(tmp_path, "a", 0.8) is None and read_budget(tmp_path, "b") is None
    stored = json.loads((tmp_path / "budget.json").read_text())
    table = {entry["target"]: entry for dial in stored["dials"] for entry in dial["targets"]}
    assert {dial["images"] for dial in stored["dials"]} == {400} and sorted(table) == [0.5, 0.6]
    assert Setting(*(table[0.6][name] for name in ("price", "other", "part"))) == free.fit(0.6).setting
    assert table[0.6]["low"] < table[0.6]["share"] < table[0.6]["high"]
    another = calibration(STEPS[:2])  # another program's, of the same dial
    another.searched = {0.9: another.fit(0.9)}
    write_budget(tmp_path, "a", another)
    merged = read_budget(tmp_path, "a")
    assert merged is not None and merged.points == free.points and set(merged.searched) == {0.5, 0.6, 0.9}
    write_budget(tmp_path, "b", capped, standing={"a", "b"})  # best.pt beside last.pt: both stay
    assert read_budget(tmp_path, "a") == merged and read_budget(tmp_path, "b") == capped
    write_budget(tmp_path, "c", capped)  # trained anew: nothing of the old ones stays
    assert read_budget(tmp_path, "a") is None and read_budget(tmp_path, "c", 0.7) is None


def test_a_target_searched_for_keeps_its_setting_whatever_is_measured_later() -> None:
    shares = {-9.0: 1.0, 0.0: 0.5, 9.0: 0.1}
    dial = Dial(lambda price: (shares.get(price, 0.5 - price / 20), 0.1), (-9.0, 9.0))
    found = dial.find(0.5)
    assert found.setting == Setting(0.0)
    dial.calibration.add(-0.5, 0.5015, 0.1)
    dial.calibration.add(0.5, 0.5, 0.1)
    dial.calibration.points.pop(0.0)  # so that a fit made anew would be another one
    assert dial.find(0.5) == dial.calibration.fit(0.5) == dial.calibration.within_reach(0.5) == found


def test_the_second_format_is_read_on(tmp_path: Path) -> None:
    made = calibration(STEPS)
    made.searched = {0.6: made.fit(0.6)}
    write_budget(tmp_path, "a", made)
    content = json.loads((tmp_path / "budget.json").read_text())
    (dial,) = content["dials"]
    old = {"format": 2, **{name: dial.pop(name) for name in ("checkpoint", "images")}, "dials": [dial]}
    (tmp_path / "budget.json").write_text(json.dumps(old))
    assert read_budget(tmp_path, "a") == made and read_budget(tmp_path, "b") is None and not outdated(tmp_path)
    write_budget(tmp_path, "b", made, standing={"a"})
    assert read_budget(tmp_path, "a") == read_budget(tmp_path, "b") == made


def test_a_dial_of_another_make_is_left_behind(tmp_path: Path) -> None:
    (tmp_path / "budget.json").write_text('{"format": 3, "dials": [{}]}')
    write_budget(tmp_path, "a", calibration(STEPS))
    assert read_budget(tmp_path, "a") == calibration(STEPS)


def test_the_first_format_is_outdated_and_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / "budget.json").write_text('{"checkpoint": "a", "images": 9, "settings": [[0.0, 0.5]]}')
    assert outdated(tmp_path) and read_budget(tmp_path, "a") is None
    write_budget(tmp_path, "a", calibration(STEPS))
    assert not outdated(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 3}', '{"format": 3, "dials": [1]}'])
def test_a_broken_file_is_said(content: str, tmp_path: Path) -> None:
    (tmp_path / "budget.json").write_text(content)
    with pytest.raises(InputError, match="is not a table of settings"):
        read_budget(tmp_path, "a")


# --- latency ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ms", "share"), [(2.0, 0.4), (3.0, 0.6), (5.0, 0.9), (6.0, 1.0), (99.0, 1.0)])
def test_milliseconds_become_a_share(ms: float, share: float) -> None:
    assert share_for_latency([(0.8, 4.0), (0.4, 2.0), (1.0, 6.0)], ms) == pytest.approx(share)


def test_a_dearer_net_that_ran_faster_is_noise() -> None:
    rows = [(0.4, 2.0), (0.6, 4.0), (0.8, 3.0), (1.0, 5.0)]
    shares = [share_for_latency(rows, ms) for ms in (2.0, 3.0, 3.9, 4.0, 4.5, 5.0)]
    assert shares == sorted(shares) and shares[1] == pytest.approx(0.5) and shares[3] == 0.8


@pytest.mark.parametrize(("share", "ms"), [(0.1, 2.0), (0.4, 2.0), (0.6, 3.0), (0.9, 5.0), (1.0, 6.0), (1.2, 6.0)])
def test_a_share_has_its_milliseconds(share: float, ms: float) -> None:
    assert latency_for_share([(0.8, 4.0), (0.4, 2.0), (1.0, 6.0)], share) == pytest.approx(ms)
    assert latency_for_share([(0.8, 4.0), (0.4, 2.0), (0.6, 5.0)], 0.7) == 5.0, "a dearer net that ran faster is noise"


def test_too_short_a_time_is_out_of_reach() -> None:
    with pytest.raises(OutOfReach, match="1 ms an image is out of reach: the latency table has 2 to 4 ms"):
        share_for_latency([(0.4, 2.0), (0.8, 4.0)], 1.0)


def test_what_is_forgiven_and_what_counts_as_met_are_small() -> None:
    made = calibration(STEPS)
    assert made.within_reach(0.281).share == 0.3
    with pytest.raises(OutOfReach):
        made.within_reach(0.279)
    assert made.fit(0.5019).setting.part == 0.0 < made.fit(0.5021).setting.part


def test_a_chain_goes_on_from_the_one_that_reaches_further() -> None:
    assert calibration([(-1.0, 0.5), (0.0, 0.9), (1.0, 0.1)]).span() == (0.1, 0.9)


def test_of_two_chains_as_long_the_one_that_reaches_further_is_kept() -> None:
    assert calibration([(-2.0, 0.5), (-1.0, 0.4), (0.0, 0.9), (1.0, 0.6)]).span() == (0.6, 0.9)


def test_the_interval_of_a_mix_knows_the_spread_of_both_prices() -> None:
    made = Calibration(400)
    made.add(0.0, 0.5, 0.1)
    made.add(-1.0, 0.8, 0.3)
    fit = made.fit(0.65)
    variance = (0.1**2 + 0.3**2) / 2 + 0.15**2
    assert fit.high - fit.share == pytest.approx(1.959964 * math.sqrt(variance / 400))


def test_points_of_another_number_of_images_are_not_mixed_in_and_the_last_word_on_a_target_stands(
    tmp_path: Path,
) -> None:
    few, many = calibration(STEPS[:3], images=100), calibration(STEPS[2:], images=400)
    write_budget(tmp_path, "a", few)
    write_budget(tmp_path, "a", many)
    assert read_budget(tmp_path, "a") == many
    again = calibration([(-0.4, 0.8), (0.0, 0.51), (0.4, 0.3)])
    many.searched, again.searched = {0.4: many.fit(0.4)}, {0.4: again.fit(0.4)}
    assert many.searched != again.searched
    for one in (many, again):
        write_budget(tmp_path, "a", one)
    found = read_budget(tmp_path, "a")
    assert found is not None and found.searched == again.searched and found.points[0.0] == again.points[0.0]


def searched(folder: Path, targets: list[float]) -> None:
    made = calibration(STEPS)
    for target in targets:
        made.searched = {target: made.fit(target)}
        write_budget(folder, "a", made)


def test_programs_that_search_at_once_lose_no_setting(tmp_path: Path) -> None:
    started = [Process(target=searched, args=(tmp_path, [k / 10 + i / 1000 for i in range(15)])) for k in (4, 5, 6)]
    for one in started:
        one.start()
    for one in started:
        one.join()
    found = read_budget(tmp_path, "a")
    assert found is not None and len(found.searched) == 45


def test_a_target_beyond_either_end_is_out_of_reach_and_fits_the_end_nearest_to_zero() -> None:
    made = calibration(STEPS[2:])
    for target in (0.2, 0.6):
        with pytest.raises(OutOfReach, match=r"reaches 0\.300 to 0\.500"):
            made.within_reach(target)
    assert made.fit(0.2).setting == Setting(0.5) and made.fit(0.6).setting == Setting(0.0)
