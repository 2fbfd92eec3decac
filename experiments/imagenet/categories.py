"""Cuts ImageNet's 1000 classes into 58 big categories by the WordNet tree: src/dynroute/data/imagenet_categories.csv.

DMNN says that it takes 58 from the hierarchy, not which; the rule is ours, and needs no choice by hand:
1. A tree: of several parents a node keeps the one with the most ImageNet classes below it (equal: the smallest id).
2. Begin with one category, the root, of all classes.
3. Take the category with the most classes (equal: the smallest id). Its child with the most classes (equal: the smallest
   id) becomes a category of its own; what is left stays as "other" of the parent. Repeat until there are 58.
Categories have 3 to 29 classes. They are named by the first of the node's WordNet names.

Run with: python experiments/imagenet/categories.py FOLDER > src/dynroute/data/imagenet_categories.csv
FOLDER holds classes.json (rows of index, wnid, words), is_a.txt (lines of parent and child wnid), names.txt (wnid and names).
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path

CATEGORIES = 58


def categories(classes: Collection[str], edges: Iterable[tuple[str, str]], count: int) -> dict[str, tuple[str, bool]]:
    """The category of each class: a node, and whether it is the rest of that node. edges: (parent, child)."""
    parents: dict[str, list[str]] = {}
    for parent, child in edges:
        parents.setdefault(child, []).append(parent)
    below = Counter(node for name in classes for node in above(name, parents))
    parent_of = {node: min(some, key=lambda p: (-below[p], p)) for node, some in parents.items()}
    under: dict[str, set[str]] = {}
    children: dict[str, set[str]] = {}
    for name in classes:
        node = name
        under.setdefault(node, set()).add(name)
        while node in parent_of:
            children.setdefault(parent_of[node], set()).add(node)
            node = parent_of[node]
            under.setdefault(node, set()).add(name)
    (root,) = {node for node in children if node not in parent_of}
    found = [(root, under[root], False)]
    while len(found) < count:
        largest = min(found, key=lambda one: (-len(one[1]), one[0]))
        found.remove(largest)
        node, members, _ = largest
        parts = {child: under[child] & members for child in children[node]}
        child = min(parts, key=lambda c: (-len(parts[c]), c))
        found.append((child, parts[child], False))
        if members - parts[child]:
            found.append((node, members - parts[child], True))
    return {name: (node, rest) for node, members, rest in found for name in members}


def above(node: str, parents: dict[str, list[str]]) -> set[str]:
    """The node and all its ancestors."""
    found, new = {node}, [node]
    while new:
        new = [parent for child in new for parent in parents.get(child, []) if parent not in found]
        found |= set(new)
    return found


def main(folder: Path) -> None:
    """Print the table."""
    classes = [wnid for _, wnid, _ in json.loads((folder / "classes.json").read_text(encoding="utf-8"))]
    lines = (folder / "is_a.txt").read_text(encoding="utf-8").splitlines()
    edges = [(parent, child) for parent, child in map(str.split, lines)]
    rows = (line.split(None, 1) for line in (folder / "names.txt").read_text(encoding="utf-8").splitlines())
    names = {wnid: words.split(",")[0].strip() for wnid, words in rows}
    found = categories(classes, edges, CATEGORIES)
    print("wnid,category")
    for wnid in classes:
        node, rest = found[wnid]
        print(f"{wnid},{names[node]}{' (other)' if rest else ''}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
