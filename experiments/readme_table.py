"""Put a generated table between a document's markers: readme_table.py README.md TABLE.md [MARK [PART]].

The documents' numbers are never typed: `make table` makes the tables from the result CSVs and calls this. A CSV is put as
a table too. MARK: results (the default) or another name of a pair of markers. PART of what `compare` made: rows, the
main table alone, or controls, the one beside it; of a CSV: some of its columns, run,batch,....
"""

from __future__ import annotations

import csv
import math
import re
import sys
from pathlib import Path

from dynroute.report.page import CONTROLS_HEADING


def main(document: Path, table: Path, mark: str = "results", part: str = "") -> None:
    """Replace what stands between the two markers."""
    begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
    text = document.read_text(encoding="utf-8")
    if text.count(begin) != 1 or text.count(end) != 1:
        sys.exit(f"{document} must hold the markers {begin} and {end} once each")
    head, rest = text.split(begin)
    is_csv = table.suffix == ".csv"
    made = from_csv(table, part) if is_csv else table.read_text(encoding="utf-8").strip()
    if part and not is_csv:
        rows, _, controls = made.partition(CONTROLS_HEADING)
        made = {"rows": rows, "controls": controls}[part].strip()
    document.write_text(f"{head}{begin}\n{made}\n{end}{rest.split(end)[1]}", encoding="utf-8")


def from_csv(path: Path, columns: str = "") -> str:
    """A CSV, or some of its columns, as a Markdown table; a whole one is turned on its side if it has more columns than rows."""
    with path.open(encoding="utf-8") as file:
        names, *rows = csv.reader(file)
    if columns:
        places = [names.index(name) for name in columns.split(",")]
        names, rows = [names[i] for i in places], [[row[i] for i in places] for row in rows]
    lines = [[name.replace("_", " ") for name in names], *([short(text) for text in row] for row in rows)]
    if len(names) > len(rows) and not columns:
        lines = [list(column) for column in zip(*lines, strict=True)]
    head, *body = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, "|---" * len(lines[0]) + "|", *body])


def short(text: str) -> str:
    """A decimal fraction at four digits, as 0.6624 of 0.662389105939; all else as it is."""
    if not re.fullmatch(r"-?\d+\.\d+", text):
        return text
    number = float(text)
    digits = max(0, 3 - math.floor(math.log10(abs(number)))) if number else 0
    return f"{number:.{digits}f}".rstrip("0").rstrip(".") if digits else f"{number:.0f}"


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4, 5):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
