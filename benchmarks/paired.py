"""How two policies differ on the same scenes: `python benchmarks/paired.py FIRST.json SECOND.json ...`, files of `vla eval`.

Success of each with its Wilson interval, and of every later one the difference to the first, paired by task and seed, in points
with its 95 % interval (`vla.export.parity.paired`), by group and in all.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vla.evaluate import wilson
from vla.export.parity import paired


def wins(path: str) -> dict[tuple[str, str, int], bool]:
    records = json.loads(Path(path).read_text())["records"]
    return {(r["group"], r["task"], r["seed"]): r["success"] for r in records if r["condition"] == "policy"}


def main() -> None:
    first, *others = sys.argv[1:]
    base = wins(first)
    groups = [*dict.fromkeys(key[0] for key in base), "all"]
    print("| policy | " + " | ".join(groups) + " |\n" + "| --- " * (len(groups) + 1) + "|")
    for path in (first, *others):
        own, cells = wins(path), []
        if own.keys() != base.keys():
            raise SystemExit(f"{path}: not the scenes of {first}")
        for group in groups:
            mine = {key: won for key, won in own.items() if group in ("all", key[0])}
            won, n = sum(mine.values()), len(mine)
            low, high = wilson(won, n)
            text = f"{won}/{n} = {100 * won / n:.1f} [{100 * low:.0f}, {100 * high:.0f}]"
            if path != first:
                d = paired({key: base[key] for key in mine}, mine)
                text += f"; {100 * d['difference']:+.1f} [{100 * d['low']:+.1f}, {100 * d['high']:+.1f}]"
            cells.append(text)
        print(f"| {Path(path).parents[1].name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
