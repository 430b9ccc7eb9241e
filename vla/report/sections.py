"""The words, tables and tiles of the report. Every function takes what was gathered and returns HTML, or "" for nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from vla.report.charts import Line, interval_bar, line_chart, smooth
from vla.report.gather import Gathered, number
from vla.report.lines import KIND, MEANING, interval, lines_of, percent, spread

STATES = {
    "finished": ("good", "finished"), "running": ("plain", "still running, or killed without a word"),
    "preempted": ("warn", "preempted and saved; continue with --resume"), "failed": ("bad", "failed"),
    "diverged": ("bad", "diverged"),
}  # fmt: skip


def header(run: Gathered) -> str:
    """What was trained, on what, for how long, and how it ended."""
    name = escape(run.root.resolve().name)
    config = run.policy.get("config", {}) if isinstance(run.policy.get("config"), dict) else {}
    robots = [str(r) for r in run.policy.get("embodiments", {})]
    sentences = _provenance(run).get("instructions", [])
    words = []
    if run.parameters:
        kind = config.get("backbone", {}).get("kind", "")
        words.append(f"A vision-language-action policy of {run.parameters / 1e6:.1f} M parameters{f' ({kind})' if kind else ''}")
    else:
        words.append("A vision-language-action policy")
    if robots:
        words.append(f"for {' and '.join(robots)}")
    if sentences:
        words.append(f"knowing {len(sentences)} instruction{'s' * (len(sentences) != 1)}")
    facts = [(label, value) for label, value in _facts(run, config) if value]
    chips = "".join(f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>" for label, value in facts)
    return (
        f'<header><p class="over">Run report</p><h1>{name}</h1><p class="lead">{escape(" ".join(words))}.</p>'
        f'<dl class="facts">{chips}</dl>{_banner(run)}</header>'
    )


def _facts(run: Gathered, config: Mapping[str, Any]) -> list[tuple[str, str]]:
    last = run.train[-1] if run.train else {}
    step, steps = run.status.get("step", last.get("step")), run.status.get("steps")
    datasets = _datasets(run)
    episodes, frames = (sum(int(number(d.get(k)) or 0) for d in datasets) for k in ("episodes", "frames"))
    seconds = training_seconds(run)
    speeds = [s for line in run.train if (s := number(line.get("samples_s")))]
    return [
        ("Demonstrations", f"{episodes:,} episodes, {frames:,} frames" if episodes else ""),
        (
            "Trained",
            f"{step:,} of {steps:,} steps"
            if isinstance(step, int) and isinstance(steps, int)
            else f"{step} steps"
            if step
            else "",
        ),
        ("Time", duration(seconds) if seconds else ""),
        ("Speed", f"{sorted(speeds)[len(speeds) // 2]:,.0f} samples/s" if speeds else ""),
        ("Decoding", ", ".join(str(config[k]) for k in ("decoding", "decode") if config.get(k))),
        ("Chunk", f"{config.get('execute')} of {config['chunk']} steps executed" if config.get("chunk") else ""),
    ]


def _banner(run: Gathered) -> str:
    state = str(run.status.get("state", ""))
    out = ""
    if state and state != "finished":
        tone, words = STATES.get(state, ("warn", state))
        error = run.status.get("error")
        detail = f"<pre>{escape(str(error))}</pre>" if error else ""
        step = escape(str(run.status.get("step", "?")))
        out = f'<div class="banner {tone}"><strong>This run: {escape(words)}</strong> (step {step}).{detail}</div>'
    if run.problems:
        items = "".join(f"<li>{escape(p)}</li>" for p in run.problems)
        out += f'<div class="banner warn"><strong>Some files could not be read.</strong><ul>{items}</ul></div>'
    return out


def verdict(run: Gathered) -> str:
    """The figures to remember: success on fresh scenes by group, with what to hold them against."""
    tiles = []
    for results in _main(run):
        cells = dict(lines_of(results["rows"]))
        for group, part in cells.get("policy", {}).items():
            if part["rate"] is None:
                continue
            beside = [
                (label, cells[key][group])
                for key, label in BESIDE.items()
                if cells.get(key, {}).get(group, {}).get("rate") is not None
            ]
            rest = "".join(f"<li><span>{label}</span><b>{percent(p['rate'])} %</b></li>" for label, p in beside)
            tiles.append(
                f'<article class="card tile"><p class="over">{escape(_title(results))}</p><h3>{escape(group)}</h3>'
                f'<p class="big">{percent(part["rate"])}<span>%</span></p>{interval_bar(part, "own")}'
                f'<p class="muted">{part["successes"]} of {part["n"]} fresh, {interval(part)} %</p>'
                f"<ul>{rest}</ul></article>"
            )
    if not tiles:
        return (
            '<section><div class="banner plain"><strong>Not yet tried in a simulator.</strong> '
            "<code>vla eval RUN --suite tabletop</code> adds success rates, controls and films.</div></section>"
        )
    return f'<section id="verdict" aria-label="Success on fresh scenes"><div class="tiles">{"".join(tiles)}</div></section>'


BESIDE = {"train": "on training scenes", "swap: does the original": "swapped: the original", "blank": "blank image",
          "replay": "replayed demonstration", "expert": "scripted expert"}  # fmt: skip
"""Lines of the table repeated under a verdict."""


def controls(run: Gathered) -> str:
    """One table per evaluation: every condition with its interval, same scenes throughout."""
    blocks, mains = [], _main(run)
    for results in run.evals:
        if any(results is main for main in mains):
            blocks.append(_variants([other for other in run.evals if other["suite"] == results["suite"]]))
        lines = lines_of(results["rows"])
        groups = list(dict.fromkeys(row["group"] for row in results["rows"]))
        head = "".join(f'<th scope="col">{escape(g)}</th>' for g in groups)
        body = ""
        for label, parts in lines:
            kind = KIND.get(label, "control")
            cells = "".join(f"<td>{_cell(parts.get(g), kind)}</td>" for g in groups)
            body += f'<tr><th scope="row">{escape(label)}<small>{escape(MEANING.get(label, ""))}</small></th>{cells}</tr>'
        notes = "".join(f"<li>{escape(str(note))}</li>" for note in results.get("notes", []))
        table = (
            f"<p class='muted'>{escape(_setting(results))}</p>"
            f'<div class="scroll"><table class="rates"><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
            + (f'<ul class="notes">{notes}</ul>' if notes else "")
        )
        if any(results is main for main in mains):
            blocks.insert(-1, f"<h3>{escape(_title(results))}</h3>{table}")
        else:
            blocks.append(f"<details><summary>{escape(_title(results))}</summary>{table}</details>")
    if not blocks:
        return ""
    return (
        '<section id="controls"><h2>Success and controls</h2><p>Each line plays the same tasks on the same seeds (training '
        'scenes excepted) and differs in one thing. <b class="own">The policy</b> should be high, <b class="control">the '
        "controls</b> low: a policy that needs neither picture nor instruction would succeed there too.</p>"
        + "".join(blocks) + "</section>"
    )  # fmt: skip


def _main(run: Gathered) -> list[dict[str, Any]]:
    """The evaluation that speaks for each suite: the one called like it, or the first when all are labelled."""
    mains: dict[str, dict[str, Any]] = {}
    for results in run.evals:
        if results["suite"] not in mains or results["label"] == results["suite"]:
            mains[results["suite"]] = results
    return list(mains.values())


def _variants(some: Sequence[Mapping[str, Any]]) -> str:
    """The policy's own success in every evaluation of one suite (other decoders, other training seeds), with the range."""
    own = [(results, dict(lines_of(results["rows"])).get("policy", {})) for results in some]
    own = [(results, cells) for results, cells in own if any(part["rate"] is not None for part in cells.values())]
    if len(own) < 2:
        return ""
    groups = list(dict.fromkeys(group for _, cells in own for group in cells))
    body = ""
    for results, cells in own:
        said = f"{_played(results)}, policy {str(results.get('policy'))[:8]}"
        row = "".join(f"<td>{_cell(cells.get(group), 'own')}</td>" for group in groups)
        body += f'<tr><th scope="row">{escape(str(results["label"]))}<small>{escape(said)}</small></th>{row}</tr>'
    spans = ""
    for group in groups:
        rates = [cells[group]["rate"] for _, cells in own if group in cells and cells[group]["rate"] is not None]
        spans += f"<td>{percent(min(rates))}–{percent(max(rates))}<small> %</small></td>" if rates else "<td>–</td>"
    head = "".join(f'<th scope="col">{escape(group)}</th>' for group in groups)
    return (
        f"<h3>{escape(str(some[0]['suite']))}: the policy in {len(own)} evaluations</h3>"
        f'<div class="scroll"><table class="rates"><thead><tr><th></th>{head}</tr></thead><tbody>{body}'
        f'<tr><th scope="row">lowest to highest</th>{spans}</tr></tbody></table></div>'
    )


def _cell(part: Mapping[str, Any] | None, kind: str) -> str:
    if part is None or part["rate"] is None:
        return '<span class="muted">–</span>'
    return (
        f'<span class="rate">{percent(part["rate"])}<small> %</small></span> '
        f'<span class="muted">{part["successes"]}/{part["n"]}, {interval(part)}</span>{interval_bar(part, kind)}'
    )


def _title(results: Mapping[str, Any]) -> str:
    suite, label = str(results["suite"]), str(results["label"])
    return suite if suite == label else f"{suite} ({label.removeprefix(suite).strip('-_') or label})"


def _setting(results: Mapping[str, Any]) -> str:
    first, count = results.get("seed"), results.get("episodes")
    bits = [f"{count} episodes per column"]
    if isinstance(first, int) and isinstance(count, int):
        bits.append(f"seeds {first}–{first + count - 1}, none of them recorded for training")
    bits.append(_played(results))
    if (wall := number(results.get("wall_s"))) is not None:
        bits.append(f"{len(results.get('records', []))} episodes played in {duration(wall)}")
    if results.get("policy"):
        bits.append(f"policy {str(results['policy'])[:12]}")
    return "; ".join(bits) + "."


def _played(results: Mapping[str, Any]) -> str:
    decode, execute, chunk = (results.get(key) for key in ("decode", "execute", "chunk"))
    blended = results.get("ensemble")
    return (f"decoding {decode or 'as configured'}, {execute} of {chunk} steps executed"
            + (f", overlapping chunks averaged with decay {blended:g}" if blended is not None else ""))  # fmt: skip


def by_task(run: Gathered) -> str:
    """The policy's own episodes, task by task."""
    blocks = []
    for results in _main(run):
        tasks = [t for t in results.get("per_task", []) if t.get("rate") is not None]
        if len(tasks) < 2:
            continue
        rows = "".join(
            f"<li><span>{escape(str(t.get('instruction') or t['task']))}</span>{interval_bar(t, 'own')}"
            f'<span class="muted">{t["successes"]}/{t["n"]}</span></li>'
            for t in tasks
        )
        blocks.append(f'<h3>{escape(_title(results))}</h3><ul class="tasks">{rows}</ul>')
    return f'<section id="tasks"><h2>By instruction</h2>{"".join(blocks)}</section>' if blocks else ""


def curves(run: Gathered) -> str:
    """Training over time, and success over checkpoints when it was measured."""
    success, spreads = _success_over_training(run)
    charts = [success]
    for key, title, floor, ceiling, note in (
        ("loss", "Loss", None, None, "what is minimised; held out: the action part"),
        ("aux", "Where does this episode end?", 0.0, None, "auxiliary loss; under 0.03: grounded"),
        ("token_accuracy", "Token accuracy", 0.0, None, "share of symbols whose likeliest bin is right"),
    ):
        own = _series(run.train, key)
        lines = []
        if own[0]:
            window = max(1, len(own[0]) // 40)
            lines = [Line("raw", *own, tone=1, style="faint"), Line("training", own[0], smooth(own[1], window), tone=1)]
        lines.append(Line("held out", *_series(run.heldout, key), tone=2, style="line"))
        charts.append(line_chart(title, lines, floor=floor, ceiling=ceiling, note=note, log=key == "aux"))
    robots = list(dict.fromkeys(r for line in run.heldout for r in (line.get("l1") or {})))
    for robot in robots:
        lines = []
        dims = list(dict.fromkeys(d for line in run.heldout for d in (line.get("l1") or {}).get(robot, {})))
        for i, dim in enumerate(dims):
            found = [
                (line["step"], v)
                for line in run.heldout
                if (v := number((line.get("l1") or {}).get(robot, {}).get(dim))) is not None
            ]
            lines.append(Line(dim.split(".")[-1], [x for x, _ in found], [y for _, y in found], tone=i % 6 + 1))
        charts.append(line_chart(f"Held-out action error, {robot}", lines, floor=0.0, note="mean |error| in the robot's units"))
    charts.append(
        line_chart("Throughput", [Line("samples/s", *_series(run.train, "samples_s"))], floor=0.0, note="samples per second")
    )
    wait = _series(run.train, "data_wait")
    charts.append(
        line_chart(
            "Waiting for data",
            [Line("share of the time", wait[0], [100 * v for v in wait[1]])],
            unit=" %",
            floor=0.0,
            ceiling=10.0,
        )
    )
    charts = [chart for chart in charts if chart]
    if not charts:
        return ""
    return f'<section id="curves"><h2>Training</h2><div class="charts">{"".join(charts)}</div>{spreads}</section>'


def _success_over_training(run: Gathered) -> tuple[str, str]:
    """(chart of `vla eval --curve` with intervals, list of how far neighbouring checkpoints differ)."""
    lines, spreads = [], ""
    for i, (name, points) in enumerate(_curves(run)):
        low, high = ([100 * (number(p.get(end)) or 0.0) for p in points] for end in ("low", "high"))
        whole = all(number(p.get("low")) is not None and number(p.get("high")) is not None for p in points)
        lines.append(Line(name, [p["step"] for p in points], [100 * p["rate"] for p in points], tone=i % 6 + 1,
                          low=low if whole else None, high=high if whole else None))  # fmt: skip
        if span := spread(points):
            first, least, most = span
            spreads += f"<li>{escape(name)}: {percent(least)} to {percent(most)} % over the checkpoints from step {first:,}</li>"
    if spreads:
        spreads = f'<h3>How far the success of checkpoints differs</h3><ul class="notes">{spreads}</ul>'
    return line_chart("Success over training", lines, unit=" %", floor=0.0, ceiling=100.0,
                      note="validation scenes, 95 % intervals"), spreads  # fmt: skip


def _curves(run: Gathered) -> list[tuple[str, list[dict[str, Any]]]]:
    """(name, points by step): the group, and whatever else distinguishes its curve from another one of the group."""
    settings = ("suite", "tasks", "seed", "n", "decode", "execute")
    series: dict[tuple[str, ...], dict[int, dict[str, Any]]] = {}
    for point in run.curve:
        if number(point["rate"]) is not None and number(point["step"]) is not None:
            key = (str(point["group"]), *(_words(point.get(name)) for name in settings))
            series.setdefault(key, {})[point["step"]] = point
    named = []
    for key, points in series.items():
        twins = [other for other in series if other[0] == key[0]]
        marks = [f"{name} {key[i]}" for i, name in enumerate(settings, 1) if len({other[i] for other in twins}) > 1]
        named.append((f"{key[0]} ({'; '.join(marks)})" if marks else key[0], [points[step] for step in sorted(points)]))
    return named


def _words(setting: Any) -> str:
    return ", ".join(map(str, setting)) if isinstance(setting, list) else str(setting)


def _series(lines: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    found = [(float(line["step"]), v) for line in lines if (v := number(line.get(key))) is not None]
    return [x for x, _ in found], [y for _, y in found]


def setup(run: Gathered) -> str:
    """Data, versions and config: what somebody needs to make the run again."""
    blocks = []
    datasets = _datasets(run)
    if datasets:
        keys = [k for k in ("path", "robot", "episodes", "frames", "fingerprint") if any(k in d for d in datasets)]
        head = "".join(f"<th>{k}</th>" for k in keys)
        rows = "".join("<tr>" + "".join(f"<td>{_datum(k, d.get(k))}</td>" for k in keys) + "</tr>" for d in datasets)
        blocks.append(
            f'<h3>Datasets</h3><div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        )
    versions: dict[str, str] = {}
    for source in (run.policy.get("versions"), *(results.get("versions") for results in run.evals)):
        versions |= {str(k): str(v) for k, v in source.items()} if isinstance(source, dict) else {}
    if run.policy.get("fingerprint"):
        versions["policy fingerprint"] = str(run.policy["fingerprint"])
    if versions:
        items = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in versions.items())
        blocks.append(f'<h3>Versions</h3><dl class="pairs">{items}</dl>')
    if run.status:
        items = "".join(
            f"<div><dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd></div>" for k, v in run.status.items() if k != "error"
        )
        blocks.append(f'<details><summary>STATUS.json</summary><dl class="pairs">{items}</dl></details>')
    if run.config:
        blocks.append(f"<details><summary>config.yaml</summary><pre>{escape(run.config)}</pre></details>")
    return f'<section id="setup"><h2>To make it again</h2>{"".join(blocks)}</section>' if blocks else ""


def _datum(key: str, value: object) -> str:
    if key == "fingerprint":
        return f"<code>{escape(str(value)[:16])}</code>"
    return f"{value:,}" if isinstance(value, int) else escape(str(value))


def _provenance(run: Gathered) -> dict[str, Any]:
    found = run.policy.get("provenance")
    return found if isinstance(found, dict) else {}


def _datasets(run: Gathered) -> list[dict[str, Any]]:
    return [d for d in _provenance(run).get("datasets", []) if isinstance(d, dict)]


def training_seconds(run: Gathered) -> float:
    """Seconds spent training, over all resumes: `elapsed` starts again at 0 with each."""
    total = before = 0.0
    for line in run.train:
        now = number(line.get("elapsed"))
        if now is None:
            continue
        total += before if now < before else 0.0
        before = now
    return (total + before) or number(run.status.get("seconds")) or 0.0


def duration(seconds: float) -> str:
    """`42 s`, `5 min 3 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
