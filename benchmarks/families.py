"""Which vision-language families pass what, from the tests themselves: `python benchmarks/families.py` prints README's table."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

COLUMNS = {
    "autoregressive": ("learns_acts_and_comes_back", "-autoregressive"),
    "parallel": ("learns_acts_and_comes_back", "-parallel"),
    "LoRA, saved and loaded": ("takes_lora", ""),
    "least-used symbols": ("symbols_take_spare_rows", ""),
}
"""Column -> (part of the test's name, end of its parameter)."""


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        code = subprocess.run([sys.executable, "-m", "pytest", "-q", "-n", "0", "tests/test_families.py", f"--junitxml={report}"],
                              stdout=sys.stderr).returncode  # fmt: skip
        cases = list(ElementTree.parse(report).iter("testcase"))
    passed: dict[tuple[str, str], bool] = {}
    for case in cases:
        found = re.fullmatch(r"(\w+)\[(.+)\]", case.get("name", ""))
        for column, (part, end) in COLUMNS.items():
            if found and part in found[1] and found[2].endswith(end):
                passed[found[2].removesuffix(end), column] = not list(case)
    print("| family | " + " | ".join(COLUMNS) + " |\n|" + " --- |" * (1 + len(COLUMNS)))
    for family in dict.fromkeys(name for name, _ in passed):
        cells = ["yes" if passed.get((family, column)) else "**no**" for column in COLUMNS]
        print(f"| {family} | " + " | ".join(cells) + " |")
    return code


if __name__ == "__main__":
    sys.exit(main())
