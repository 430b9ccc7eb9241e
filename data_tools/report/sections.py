"""The words and tables of a dataset's report. Every function returns HTML, or "" for nothing."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

import numpy as np

from data_tools.check import CHECKS, ORDER, Dataset, Finding
from data_tools.check.command import count
from data_tools.report.drawing import histogram, lengths, plane, strip
from data_tools.report.facts import Facts, worst

FILM_BYTES, MOST_FILMS = 4_600_000, 150
"""Films are embedded up to this much (a third more as text), and for so many episodes."""
TONES = {"error": "bad", "warning": "warn", "note": "plain"}
MOST_SAID, MOST_UNUSUAL = 6, 15


def header(data: Dataset, findings: Sequence[Finding], facts: Facts) -> str:
    """What it is, how much, and the verdict in one line."""
    name = escape(data.root.resolve().name)
    if data.layout is None:
        return (
            f'<header><p class="over">Dataset report</p><h1>{name}</h1><p class="lead">It cannot be read; see below.</p></header>'
        )
    spec, info = data.spec, data.layout.info
    seconds = data.layout.num_frames / data.fps
    sizes = sum(path.stat().st_size for path in data.root.rglob("*") if path.is_file())
    robot = spec.robot or spec.name if data.declared else f"{spec.name} (conventions not declared)"
    rows = [
        ("Episodes", f"{data.layout.num_episodes:,}"),
        ("Rows", f"{data.layout.num_frames:,} at {data.fps:g} Hz"),
        ("Time", f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.1f} min"),
        ("Cameras", ", ".join(f"{c} {size.width}×{size.height}" for c, size in spec.cameras.items()) or "none"),
        ("State, action", f"{spec.state_dim}, {spec.action_dim} dimensions"),
        ("Instructions", f"{len(facts.instructions)}"),
        ("Format", f"LeRobot {info.get('codebase_version', '?')}"),
        ("On disk", f"{sizes / 1e6:,.1f} MB"),
    ]
    chips = "".join(f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>" for label, value in rows)
    counts = count(findings)
    if counts["error"]:
        tone, words = "bad", "Do not train on it yet"
    elif counts["warning"]:
        tone, words = "warn", "Usable; look at the warnings first"
    else:
        tone, words = "good", "Nothing speaks against training on it"
    listed = ", ".join(f"{n} {severity}{'s' * (n != 1)}" for severity, n in counts.items())
    return (
        f'<header><p class="over">Dataset report</p><h1>{name}</h1><p class="lead">{escape(robot)}</p>'
        f'<dl class="facts">{chips}</dl><div class="banner {tone}"><strong>{words}.</strong> {listed}.</div></header>'
    )


def said(findings: Sequence[Finding]) -> str:
    """The findings, grouped, worst first; errors unfolded."""
    if not findings:
        return '<section id="findings"><h2>Findings</h2><p>None of the checks found anything.</p></section>'
    groups = sorted({(f.severity, f.code) for f in findings}, key=lambda key: (ORDER[key[0]], key[1]))
    out = []
    for severity, code in groups:
        same = [f for f in findings if (f.severity, f.code) == (severity, code)]
        rows = "".join(
            f"<tr><td>{_place(f)}</td><td>{escape(f.found)}<small>expected {escape(f.expected)}</small></td></tr>"
            for f in same[:MOST_SAID]
        )
        more = (
            f'<p class="muted">and {len(same) - MOST_SAID} more: {_numbers(same[MOST_SAID:])}</p>'
            if len(same) > MOST_SAID
            else ""
        )
        about = CHECKS[code].about if code in CHECKS else ""
        out.append(
            f'<details class="finding {TONES[severity]}"{" open" if severity == "error" else ""}><summary>'
            f'<span class="badge {TONES[severity]}">{severity}</span> {escape(about)} <code>{escape(code)}</code>'
            f'<b class="times">{len(same)}</b></summary><div class="scroll"><table>{rows}</table></div>{more}'
            f'<p class="fix"><b>Fix:</b> {escape(same[0].fix)}</p></details>'
        )
    return f'<section id="findings"><h2>Findings</h2>{"".join(out)}</section>'


def _place(finding: Finding) -> str:
    text = escape(finding.place)
    if finding.episode is None:
        return text
    return text.replace(f"episode {finding.episode}", f'<a href="#ep-{finding.episode}">episode {finding.episode}</a>', 1)


def _numbers(findings: Sequence[Finding]) -> str:
    episodes = sorted({f.episode for f in findings if f.episode is not None})
    return "episodes " + ", ".join(map(str, episodes[:30])) + (" …" if len(episodes) > 30 else "") if episodes else "elsewhere"


def films(data: Dataset, findings: Sequence[Finding], facts: Facts) -> str:
    """A card per episode whose pictures play under the pointer or the focus; those worth a look are always among them."""
    if data.rows is None or not data.films or data.layout is None:
        return ""
    marked = worst(list(findings))
    odd = [u.episode for u in facts.unusual]
    total = len(data.rows.episodes)
    spread = np.unique(np.linspace(0, total - 1, min(total, MOST_FILMS)).round().astype(int)).tolist()
    wanted = list(dict.fromkeys([*list(marked)[:40], *odd[:40], *spread]))[:MOST_FILMS]
    left, cards = FILM_BYTES, {}
    for e in wanted:
        strips = []
        for camera, reel in data.films.items():
            film = reel[e] if e < len(reel) else None
            if film is not None and film.thumbs:
                content, n, ratio = strip(film.thumbs)
                if len(content) <= left:
                    left -= len(content)
                    strips.append((camera, content, n, ratio))
        if strips:
            cards[e] = _card(data, e, strips, marked.get(e), facts)
    if not cards:
        return ""
    note = (
        f"{len(cards)} of {total} episodes, those with findings and the unusual ones among them. " if len(cards) < total else ""
    )
    wide = min(3, len(data.films))
    return (
        f'<section id="episodes"><h2>Episodes</h2><p>{note}They play under the pointer or the keyboard’s focus; a '
        "click or Enter stops "
        "and starts, the arrow keys step. </p>"
        '<form class="tools" onsubmit="return false"><label>Find <input type="search" id="find" '
        'placeholder="instruction or number"></label>'
        '<label>Order <select id="order"><option value="n">number</option><option value="score">most unusual</option>'
        '<option value="length">longest</option><option value="-length">shortest</option></select></label>'
        '<output id="shown"></output></form>'
        f'<div class="eps" style="--wide:{wide}">{"".join(cards[e] for e in sorted(cards))}</div>'
        f'<button type="button" class="more" id="all" hidden>Show all {len(cards)} episodes</button></section>'
    )


def _card(data: Dataset, e: int, strips: list[tuple[str, bytes, int, float]], severity: str | None, facts: Facts) -> str:
    assert data.layout is not None
    number = int(facts.task[e]) if e < len(facts.task) else -1
    text = data.layout.instructions[number] if 0 <= number < len(data.layout.instructions) else ""
    rows = int(facts.lengths[e]) if e < len(facts.lengths) else 0
    pictures = "".join(
        f'<div class="strip" data-n="{n}" style="aspect-ratio:{ratio:.3f};background-size:{n * 100}% 100%;'
        f'background-image:url(data:image/webp;base64,{base64.b64encode(content).decode()})"'
        + (f'><span class="cam">{escape(camera)}</span></div>' if len(strips) > 1 else "></div>")
        for camera, content, n, ratio in strips
    )
    badge = f'<span class="badge {TONES[severity]}">{severity}</span>' if severity else ""
    return (
        f'<article class="card ep" id="ep-{e}" tabindex="0" role="img" aria-label="Episode {e}: {escape(text)}, '
        f'{rows} rows" data-e="{e}" '
        f'data-length="{rows}" data-score="{facts.scores.get(e, 0.0):.2f}"><div class="reel">{pictures}</div><i class="at"></i>'
        f'<p class="caption">{escape(text)}</p><p class="muted"><b>{e}</b> · {rows} rows '
        f"{badge}</p></article>"
    )


def strange(facts: Facts) -> str:
    """The most unusual episodes and why."""
    if not facts.unusual:
        return '<section id="unusual"><h2>Unusual episodes</h2><p>No episode stands far apart from the others.</p></section>' \
            if len(facts.lengths) >= 5 else ""  # fmt: skip
    rows = "".join(
        f'<tr><td><a href="#ep-{u.episode}">episode {u.episode}</a></td><td class="number">{u.score:.1f}</td>'
        f"<td>{escape(u.reason)}</td></tr>"
        for u in facts.unusual[:MOST_UNUSUAL]
    )
    more = f'<p class="muted">{len(facts.unusual) - MOST_UNUSUAL} more.</p>' if len(facts.unusual) > MOST_UNUSUAL else ""
    return (
        '<section id="unusual"><h2>Unusual episodes</h2><p>Ranked by how many robust standard deviations an episode '
        "is away from the "
        "middle of all, in what it is most unusual in. Unusual is not wrong: a rare good demonstration looks the same.</p>"
        '<div class="scroll"><table><thead><tr><th>Episode</th><th class="number">Distance</th><th>In what</th></tr>'
        f"</thead>{rows}</table>"
        f"</div>{more}</section>"
    )


def distributions(data: Dataset, facts: Facts) -> str:
    """Every dimension against its limits."""
    out = []
    for part in ("action", "state"):
        if facts.spreads.get(part):
            out.append(f'<h3>{part.capitalize()}</h3><div class="dims">{"".join(map(histogram, facts.spreads[part]))}</div>')
    if not out:
        return ""
    how = (
        "Dashed lines are the declared limits, values beyond them red."
        if data.declared
        else "Nobody has declared limits for this robot, so none are drawn."
    )
    return (
        f'<section id="values"><h2>State and action</h2><p>{how} The bar below each histogram spans 98 % of the rows '
        "(q01 to q99), which "
        "is what normalising stretches over [-1, 1]. Heights are square roots, so that rare values can be seen."
        f"</p>{''.join(out)}</section>"
    )


def coverage(data: Dataset, facts: Facts) -> str:
    """Where the robot was and began; instructions; lengths."""
    views = "".join(plane(view) for view in facts.planes)
    if not views:
        return ""
    return (
        '<section id="coverage"><h2>Coverage</h2><p>How often each place was visited, from <b class="cold">seldom</b> to '
        f'<b class="warm">often</b>; circles are starts, coloured by instruction.</p><div class="charts">{views}</div></section>'
    )


def words(data: Dataset, facts: Facts) -> str:
    """Instructions with counts, and lengths."""
    if data.layout is None or not facts.instructions:
        return ""
    most = max(episodes for _, episodes, _ in facts.instructions)
    rows = "".join(
        f"<li><span>{escape(text)}</span>"
        '<svg class="bar own" viewBox="0 0 100 12" preserveAspectRatio="none" aria-hidden="true"><rect class="track" '
        'width="100" height="12"/>'
        f'<rect class="fill" width="{100 * episodes / most:.1f}" height="12"/></svg><span class="muted">{episodes} × '
        f"{n / episodes:.0f}</span></li>"
        for text, episodes, n in facts.instructions[:60]
    )
    more = f'<p class="muted">{len(facts.instructions) - 60} more instructions.</p>' if len(facts.instructions) > 60 else ""
    return (
        '<section id="words"><h2>Instructions and lengths</h2><p>Episodes × mean rows.</p><ul class="tasks '
        f'said">{rows}</ul>{more}'
        f'<div class="charts">{lengths(facts.lengths, data.fps)}</div></section>'
    )
