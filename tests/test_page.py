"""The page: its numbers are those of the CSVs, and a real browser shows it without an error, on a telephone too."""

from __future__ import annotations

import csv
import html
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from dynroute.report import compare
from dynroute.report.page import render
from dynroute.report.pictures import Picture
from dynroute.report.read import LeftOut
from dynroute.report.tables import build, empty
from test_report import STATIC, row, save

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
]
QUIET += ["--disable-sync", "--disable-quic", "--disable-extensions", "--mute-audio"]


class Tables(HTMLParser):
    """The texts of a page's tables by their name; details inside a cell are left out."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.name, self.cell, self.hidden = "", False, 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "div" and dict(attrs).get("role") == "region":
            self.name = str(dict(attrs)["aria-label"])
            self.tables[self.name] = []
        elif tag == "tr":
            self.tables[self.name].append([])
        elif tag in ("th", "td"):
            self.tables[self.name][-1].append("")
            self.cell = True
        self.hidden += tag == "details"

    def handle_endtag(self, tag: str) -> None:
        self.cell = self.cell and tag not in ("th", "td")
        self.hidden -= tag == "details"

    def handle_data(self, data: str) -> None:
        if self.cell and not self.hidden:
            self.tables[self.name][-1][-1] += data

    def rows(self, name: str) -> list[dict[str, str]]:
        head, *rows = self.tables[name]
        return [dict(zip(head, cells, strict=True)) for cells in rows]


def example(tmp_path: Path) -> Path:
    """A comparison of static nets, routed runs of three seeds with controls, a paper and a broken run; its folder."""
    target = {"flops_target": 0.5}
    seeds = [
        row(0.5, t, run=f"d-s{i}", seed=i, commit="0123456789", **target) for i, t in enumerate((0.86, 0.87, 0.89))
    ]
    others = [row(0.31, 0.83 - i / 100, run=f"r{i}", method="rnr", config_hash=f"r{i}") for i in range(9)]
    shuffled = row(0.31, 0.82, run="r0", method="rnr", config_hash="r0", control="shuffled")
    paths = save(tmp_path / "runs", *STATIC, *seeds, *others, shuffled)
    (tmp_path / "runs" / "half").mkdir()
    (tmp_path / "runs" / "half" / "eval.csv").write_text("run,meth")
    compare([*paths, tmp_path / "runs" / "half"], tmp_path / "out", ["dmnn:tab3"])
    return tmp_path / "out"


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def number(text: str) -> float:
    """The first number of a cell; nan where it is empty."""
    return float(text.split()[0]) if text else float("nan")


def test_the_numbers_are_those_of_the_csvs(tmp_path: Path) -> None:
    out = example(tmp_path)
    page = Tables((out / "index.html").read_text())
    table, shown = [r for r in read(out / "table.csv") if not r["control"]], page.rows("Results")
    assert len(shown) == len(table) == 12
    columns = {"FLOPs (multiply-adds)": ("macs_mean", 1e-6), "share": ("macs_share", 100), "top-1 %": ("top1", 100)}
    columns |= {"vs static": ("vs_static", 1), "95 % interval": ("vs_static_low", 1), "target": ("flops_target", 1)}
    for there, line in zip(shown, table, strict=True):
        for name, (column, unit) in columns.items():
            wanted = float(line[column] or "nan") * unit
            assert number(there[name]) == pytest.approx(
                wanted, abs=0.051 if name == "share" else 0.0051, nan_ok=True
            ), name
    (seeds,) = [r for r in shown if r["method"] == "dmnn"]
    assert seeds["top-1 %"] == "87.33 +- 1.53 (3)"
    lines, shown = read(out / "controls.csv"), page.rows("Controls")
    by_row = [list(group) for _, group in groupby(lines, lambda r: (r["method"], r["label"], r["basis"]))]
    assert len(by_row) == len(shown) < len(lines)
    for there, group in zip(shown, by_row, strict=True):
        for line in group:
            cell = there[line["control"]]
            assert number(cell) == pytest.approx(float(line["difference"]), abs=0.0051)
            assert cell.endswith(" x") == (line["beaten"] == "False")
    reported = read(out / "papers.csv")
    for there, line in zip(page.rows("dmnn:tab3"), reported, strict=True):
        assert number(there["reported top-1 error %"]) == float(line["reported_top1_error_pct"])


def test_what_made_a_row_is_at_hand_and_what_is_left_out_is_named(tmp_path: Path) -> None:
    text = (example(tmp_path) / "index.html").read_text()
    made = "<dt>runs</dt><dd>d-s0 d-s1 d-s2</dd><dt>seeds</dt><dd>0 1 2</dd><dt>test images</dt><dd>10000</dd>"
    assert "<summary>0123456</summary><dl>" + made in text
    assert "Left out (1)" in text and "half-written" in text
    assert "2 of 4" not in text and "Not yet reproduced (4 of 4)" in text
    assert set(re.findall(r'href="#([^"]+)"', text)) <= set(re.findall(r'id="([^"]+)"', text))


def test_pictures_and_a_route_table_are_shown(tmp_path: Path) -> None:
    svg = '<svg viewBox="0 0 1 1"></svg>'
    picture = Picture("histogram", "Cost of <images>", "A & B.", svg, tmp_path / "histo gram.csv")
    left_out: list[LeftOut] = []
    made = build([{**vars(row(0.5, 0.9)), **BESIDE}], left_out)
    text = render(made, [], pictures=[picture], route_table=[{"run": "<r>", "entropy": "1.5"}], route_notes=["bits"])
    assert '<figure id="histogram">\n<h3>Cost of &lt;images&gt;</h3>' in text
    assert '<a href="histo%20gram.csv">histo gram.csv</a>' in text
    assert text.count("<svg") == 1
    assert Tables(text).rows("Routes") == [{"run": "<r>", "entropy": "1.5"}]
    assert "<li>bits</li>" in text and 'href="#routes"' in text
    assert "Routes" not in render(empty(), [])


BESIDE: dict[str, Any] = {"parts": "", "variant": "", "trained_for": "", "routes_file": "", "timed": [], "times": {}}


# --- in a browser -----------------------------------------------------------------------------------------------


def browser() -> str:
    """The command of a Chromium; skips where there is none. DYNROUTE_BROWSER names one elsewhere."""
    found = os.environ.get("DYNROUTE_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if not found:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed, and DYNROUTE_BROWSER is not set")
    return found


PROBE = """\
<!doctype html><meta charset="utf-8"><body>
<iframe width="WIDTH" height="700" srcdoc="PAGE"></iframe><pre id="answer"></pre>
<script>
const frame = document.querySelector("iframe");
frame.addEventListener("load", () => {
  const page = frame.contentDocument, table = page.querySelector("table"), answer = {};
  const column = (i) => [...table.tBodies[0].rows].filter((r) => !r.hidden).map((r) => r.cells[i].textContent.trim());
  const heads = [...table.tHead.rows[0].cells], top1 = heads.findIndex((h) => h.textContent.startsWith("top-1"));
  const button = heads[top1].querySelector("button");
  answer.viewport = frame.contentWindow.innerWidth;
  answer.wide = page.documentElement.scrollWidth;
  answer.tables = [...page.querySelectorAll("[role=region]")].map((r) => r.getAttribute("aria-label"));
  answer.figures = [...page.querySelectorAll("figure svg")].map((s) => s.getBoundingClientRect().width > 100);
  answer.plain = column(top1);
  button.click(); answer.up = column(top1); answer.sort = heads[top1].getAttribute("aria-sort");
  button.click(); answer.down = column(top1);
  const filter = page.querySelector("input[type=search]");
  filter.value = "RNR r3"; filter.dispatchEvent(new Event("input")); answer.filtered = column(1);
  answer.background = getComputedStyle(page.body).backgroundColor;
  document.getElementById("answer").textContent = JSON.stringify(answer);
});
</script>
"""


def probe(page: Path, width: int, *flags: str) -> tuple[dict[str, Any], str]:
    """What a headless browser sees of a page in a window of a width, and what its console says."""
    wrapper = page.with_name("probe.html")
    shown = html.escape(page.read_text(encoding="utf-8"))
    wrapper.write_text(PROBE.replace("WIDTH", str(width)).replace("PAGE", shown), encoding="utf-8")
    words = [browser(), "--headless", *QUIET, f"--user-data-dir={page.parent / 'profile'}", "--enable-logging=stderr"]
    words += [*flags, "--virtual-time-budget=5000", "--dump-dom", wrapper.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    found = re.search(r'<pre id="answer">(.+?)</pre>', done.stdout)
    assert found, done.stderr
    return json.loads(html.unescape(found[1])), "\n".join(x for x in done.stderr.splitlines() if "CONSOLE" in x)


@pytest.mark.parametrize("width", [375, 1280])
def test_a_browser_shows_the_page(tmp_path: Path, width: int) -> None:
    page = example(tmp_path) / "index.html"
    seen, console = probe(page, width)
    assert console == ""
    assert seen["viewport"] == width >= seen["wide"]  # no sideways scrolling of the page
    assert seen["tables"] == ["Results", "Controls", "dmnn:tab3"]
    assert seen["figures"] == [True]
    values = [number(text) for text in seen["plain"]]
    assert [number(text) for text in seen["up"]] == sorted(values) != values
    assert [number(text) for text in seen["down"]] == sorted(values, reverse=True)
    assert seen["sort"] == "ascending"
    assert seen["filtered"] == ["r3"]


def test_the_page_goes_dark_with_the_reader(tmp_path: Path) -> None:
    page = example(tmp_path) / "index.html"
    light, _ = probe(page, 800)
    dark, _ = probe(page, 800, "--blink-settings=preferredColorScheme=0")
    assert light["background"] == "rgb(255, 255, 255)" != dark["background"]


def test_an_error_on_the_page_is_seen(tmp_path: Path) -> None:
    page = example(tmp_path) / "index.html"
    page.write_text(page.read_text().replace("</body>", "<script>nothing.there</script></body>"))
    assert "nothing is not defined" in probe(page, 800)[1]
