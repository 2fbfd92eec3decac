"""Put a generated table between the README's markers: readme_table.py README.md TABLE.md.

The README's numbers are never typed: `make table` makes the table from the result CSVs and calls this.
"""

from __future__ import annotations

import sys
from pathlib import Path

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def main(readme: Path, table: Path) -> None:
    """Replace what stands between the two markers."""
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        sys.exit(f"{readme} must hold the markers {BEGIN} and {END} once each")
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    readme.write_text(f"{head}{BEGIN}\n{table.read_text(encoding='utf-8').strip()}\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
