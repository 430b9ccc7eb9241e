"""The report of a run: one HTML file that needs nothing but a browser, made from whatever the run folder has.

    path = write_report(Path("runs/demo"))     # runs/demo/report.html

Films are embedded, charts are inline SVG, styles and the little script are in the file; nothing is fetched. The parts:
`gather` reads the folder, `charts` draws, `sections` writes the prose and tables, `report.css` and `report.js` dress it.
"""

from __future__ import annotations

from datetime import UTC, datetime
from html import escape
from pathlib import Path

from vla.durable import replace_file
from vla.errors import CheckpointError
from vla.report.gather import MARKS, gather
from vla.report.rollouts import rollouts
from vla.report.sections import by_task, controls, curves, header, setup, verdict

HERE = Path(__file__).parent


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into the run folder (atomically) and return its path. Missing or broken pieces are left out,
    broken ones with a line that says so.

    Raises `CheckpointError` when there is no such folder or nothing of a run in it, `MachineError` on a full disk.
    """
    root = Path(run_dir)
    if not root.is_dir() or not any((root / name).exists() for name in MARKS):
        found = f"nothing of a run ({', '.join(MARKS)})" if root.is_dir() else "a file" if root.exists() else "no such folder"
        raise CheckpointError(root, found=found, expected="a run folder, as `vla train` makes",
                              fix="give the run.out of a training run, e.g. `vla report runs/demo`")  # fmt: skip
    run = gather(root)
    body = [verdict(run), rollouts(run), controls(run), by_task(run), curves(run), setup(run)]
    parts = [header(run), *body]  # the header names the files that could not be read, so it is written last
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f'<title>{escape(run.root.resolve().name)}: run report</title><link rel="icon" href="data:,">'
        f"<style>{(HERE / 'report.css').read_text()}</style></head>\n<body><main>\n" + "\n".join(filter(None, parts))
        + f"\n<footer>Written by tendon-vla, {made}. Intervals are Wilson 95 %.</footer></main>"
        f"\n<script>{(HERE / 'report.js').read_text()}</script></body></html>\n"
    )  # fmt: skip
    path = run.root / "report.html"
    replace_file(path, page)
    return path
