"""`vla data check`: the findings as a table, or as JSON."""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path

from data_tools.check.finding import CHECKS, ORDER, Finding

SHOWN = 3
"""Findings of one code printed one by one; the rest are counted."""


def add_check_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add `check` to the `vla data` sub-commands; `run` carries it out."""
    listed = "\n".join(f"  {check.code:22s} {check.about}" for check in CHECKS.values())
    parser = subparsers.add_parser(
        "check",
        help="find what is wrong with a dataset, before it is trained on",
        description="Looks at files, numbers, pictures and words of LeRobot datasets, and at how several fit together. "
        "Exit code 3 when there is an error, or, with --strict, a warning.",
        epilog="examples:\n  vla data check data/tabletop\n  vla data check data/fetch data/aloha --strict --json\n"
        f"\nchecks (leave one out with --skip):\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "roots", type=Path, nargs="+", metavar="DIR", help="LeRobot datasets; several are also held against each other"
    )
    parser.add_argument(
        "--embodiment", metavar="ROBOT", help="what the robot is, instead of meta/embodiment.json: a shipped name or YAML"
    )
    parser.add_argument("--no-frames", action="store_true", help="do not decode pictures: fast, but blind")
    parser.add_argument("--strict", action="store_true", help="warnings fail too")
    parser.add_argument(
        "--skip", metavar="CODE", action="append", default=[], help="leave out a check; may be given several times"
    )
    parser.add_argument(
        "--holdout", type=float, metavar="SHARE", help="mixture.holdout of the run to come (default: the mixture's)"
    )
    parser.add_argument("--all", action="store_true", help=f"print every finding, not {SHOWN} of a kind")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Check, print, and return 3 when something must be mended first."""
    from data_tools.check import check_all
    from vla.embodiment import load_embodiment

    spec = load_embodiment(args.embodiment) if args.embodiment else None
    findings = check_all(
        args.roots, frames=not args.no_frames, skip=args.skip, progress=not args.json, embodiment=spec, holdout=args.holdout
    )
    counts = count(findings)
    failed = counts["error"] > 0 or (args.strict and counts["warning"] > 0)
    if args.json:
        print(json.dumps({"ok": not failed, "counts": counts, "findings": [f.to_json() for f in findings]}, indent=1))
    else:
        print(table(findings, len(args.roots), None if args.all else SHOWN))
    return 3 if failed else 0


def count(findings: Sequence[Finding]) -> dict[str, int]:
    """Severity -> findings."""
    return {severity: sum(f.severity == severity for f in findings) for severity in ORDER}


def table(findings: Sequence[Finding], roots: int = 1, shown: int | None = SHOWN) -> str:
    """Findings grouped by dataset and code, worst first."""
    width = max(60, min(shutil.get_terminal_size((120, 24)).columns, 140))
    lines: list[str] = []
    for root in dict.fromkeys(f.root for f in findings):
        lines += [root] if roots > 1 else []
        own = [f for f in findings if f.root == root]
        for severity, code in sorted({(f.severity, f.code) for f in own}, key=lambda key: (ORDER[key[0]], key[1])):
            same = [f for f in own if (f.severity, f.code) == (severity, code)]
            about = CHECKS[code].about if code in CHECKS else ""
            lines.append(
                f"{severity.upper():8s} {code} x{len(same)}: {about}"
                if len(same) > 1
                else f"{severity.upper():8s} {code}: {about}"
            )
            last = None
            for finding in same[:shown]:
                lines += _wrap(finding.place, width, "  ")
                lines += _wrap(f"found     {finding.found}", width, "    ")
                lines += _wrap(f"expected  {finding.expected}", width, "    ")
                if finding.fix != last:
                    lines += _wrap(f"fix       {finding.fix}", width, "    ")
                last = finding.fix
            if shown is not None and len(same) > shown:
                places = sorted({f.episode for f in same[shown:] if f.episode is not None})
                where = f", episodes {', '.join(map(str, places[:12]))}{' ...' if len(places) > 12 else ''}" if places else ""
                lines.append(f"  and {len(same) - shown} more{where} (--all)")
            lines.append("")
    counts = count(findings)
    lines.append(", ".join(f"{n} {severity}{'s' * (n != 1)}" for severity, n in counts.items()) if findings else "nothing found")
    return "\n".join(lines)


def _wrap(text: str, width: int, indent: str) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent + "          ", break_on_hyphens=False)
