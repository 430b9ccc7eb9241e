"""`vla data report`: one HTML file a person can judge a dataset from.

    path = write_report("data/tabletop")     # data/tabletop/report.html

Findings of `vla data check` on top, then episodes that play, unusual episodes with the reason, every dimension against its
limits, coverage, instructions and lengths. Nothing is fetched; the look is that of a run's report (`vla/report`).
"""

from __future__ import annotations

import argparse
import json
import re
from datetime import UTC, datetime
from html import escape
from pathlib import Path

from data_tools.check import Finding, judge, open_dataset, unread
from data_tools.check.command import count
from data_tools.check.dataset import Dataset
from data_tools.report.facts import facts_of
from data_tools.report.sections import coverage, distributions, films, header, said, strange, words
from vla.durable import replace_file
from vla.embodiment import EmbodimentSpec, load_embodiment
from vla.errors import DataError
from vla.report import HERE as LOOK

HERE = Path(__file__).parent
_LINK = re.compile(r'<a href="#(ep-\d+)">(.*?)</a>')
PICTURES = 10
"""Pictures of an episode's film."""
PARTS = {
    "findings": "Findings",
    "episodes": "Episodes",
    "unusual": "Unusual",
    "values": "State and action",
    "coverage": "Coverage",
    "words": "Instructions",
}


def write_report(
    root: str | Path, out: str | Path | None = None, *, embodiment: EmbodimentSpec | None = None, progress: bool = False
) -> Path:
    """Write the report (atomically) to `out`, `report.html` in the dataset by default; returns its path. A damaged dataset
    gets a report of its damage.

    Raises `DataError` when there is no such folder, `MachineError` on a full disk.
    """
    return _write(Path(root), Path(out) if out else None, embodiment, progress)[0]


def _write(root: Path, out: Path | None, embodiment: EmbodimentSpec | None, progress: bool) -> tuple[Path, list[Finding]]:
    if not root.is_dir():
        raise DataError(root, found="no such folder", expected="a LeRobot dataset", fix="check the path")
    findings = unread(root)
    if findings:  # nothing is read through a link that leads out
        data = Dataset(root)
    else:
        data = open_dataset(root, embodiment, True, progress, keep=PICTURES)
        findings = judge(data)
    facts = facts_of(data)
    parts = [said(findings), films(data, findings, facts), strange(facts), distributions(data, facts), coverage(data, facts),
             words(data, facts)]  # fmt: skip
    cards = set(re.findall(r'id="(ep-\d+)"', parts[1]))  # films are bounded: nothing may link to an episode that is not shown
    parts = [_LINK.sub(lambda m: m[0] if m[1] in cards else m[2], part) for part in parts]
    links = "".join(f'<a href="#{key}">{name}</a>' for key, name in PARTS.items() if any(f'id="{key}"' in part for part in parts))
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f'<title>{escape(root.resolve().name)}: dataset report</title><link rel="icon" href="data:,">'
        f"<style>{(LOOK / 'report.css').read_text()}{(HERE / 'page.css').read_text()}</style></head>\n<body><main>\n"
        f'{header(data, findings, facts)}<nav aria-label="Parts">{links}</nav>\n'
        + "\n".join(filter(None, parts))
        + f"\n<footer>Written by tendon-vla, {made}.</footer></main>\n<script>{(HERE / 'page.js').read_text()}"
        "</script></body></html>\n"
    )
    path = out or root / "report.html"
    replace_file(path, page)
    return path, findings


def add_report_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add `report` to the `vla data` sub-commands; `run` carries it out."""
    parser = subparsers.add_parser(
        "report", help="one HTML file to judge a dataset from",
        description="Episodes that play, distributions against limits, coverage, instructions, unusual episodes, and what "
        "`vla data check` finds, in one file that needs nothing but a browser.",
        epilog="example: vla data report data/tabletop --out tabletop.html", formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("root", type=Path, metavar="DIR", help="a LeRobot dataset")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write it (default: DIR/report.html)")
    parser.add_argument(
        "--embodiment", metavar="ROBOT", help="what the robot is, instead of meta/embodiment.json: a shipped name or YAML"
    )
    parser.add_argument("--json", action="store_true", help="print the path and the counts of findings as JSON")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Write the report and print where it lies."""
    spec = load_embodiment(args.embodiment) if args.embodiment else None
    path, findings = _write(args.root, args.out, spec, not args.json)
    counts = count(findings)
    if args.json:
        print(json.dumps({"report": str(path), "counts": counts}))
    else:
        print(f"report: {path}")
    return 0
