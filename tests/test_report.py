"""The report: one file, no network, from whatever a run folder has."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla.errors import CheckpointError
from vla.report import write_report
from vla.report.charts import Line, heat_strip, line_chart, nice_ticks, png, smooth
from vla.report.gather import count_parameters, gather
from vla.report.lines import KIND, MEANING
from vla.report.rollouts import FILM_BYTES
from vla.report.sections import duration, training_seconds

NASTY = "<script>alert(1)</script>&\"'"
VOID = {"meta", "link", "img", "rect", "line", "polyline", "polygon", "circle", "br"}


class Checker(HTMLParser):
    """Balanced tags, and every address a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: dict[str, int] = {}

    def handle_starttag(self, tag, attrs):
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href", "poster", "data", "action", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open and self.open.pop() == tag, tag


def check(path: Path) -> tuple[str, Checker]:
    page = path.read_text()
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert all(a.startswith("data:") for a in checker.addresses)
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttp", page), "the page would reach out"
    assert checker.tags["script"] == checker.tags["style"] == 1
    return page, checker


def rate(successes: int, n: int = 20) -> dict:
    return {
        "successes": successes,
        "n": n,
        "rate": successes / n,
        "low": max(0, successes / n - 0.1),
        "high": min(1, successes / n + 0.1),
    }


def results(**changes) -> dict:
    rows = [
        {"group": g, "condition": c, **rate(s), "original": rate(0) if c == "swap" else None, "mean_steps": 9.0,
         "failures": {"failure": 0, "timeout": 20 - s}}
        for g in ("touch", "push") for c, s in (("policy", 19), ("swap", 18), ("blank", 1), ("expert", 20))
    ]  # fmt: skip
    clip = {
        "file": "tabletop-clips/a.mp4", "condition": "policy", "group": "touch", "task": "touch-red", "given": None,
        "instruction": f"touch {NASTY}", "seed": 900000, "success": True, "failure": False, "steps": 5, "fps": 10.0, "stride": 1,
        "action_names": ["eef.dx", "gripper.close"], "actions": [[0.1, 1.0]] * 5, "confidence": [[0.9, 0.2]] * 5,
        "symbols": [[3, 255]] * 5, "decisions": [0, 4],
    }  # fmt: skip
    tasks = [{"task": t, "instruction": f"{t} {NASTY}", "condition": "policy", "group": "touch", **rate(9, 10)} for t in "ab"]
    return {
        "schema": 1, "suite": "tabletop", "seed": 900000, "episodes": 20, "tasks": ["touch-red"], "conditions": [], "execute": 4,
        "chunk": 8, "decode": "mean", "policy": "ab" * 32, "versions": {"mujoco": "3.3.0"}, "rows": rows, "per_task": tasks,
        "records": [{}] * 3, "clips": [clip], "notes": [f"a note {NASTY}"], "wall_s": 12.0, "cpu_s": 20.0,
    } | changes  # fmt: skip


@pytest.fixture()
def whole(tmp_path) -> Path:
    """A run folder with everything in it."""
    (tmp_path / "policy").mkdir()
    clips = tmp_path / "eval" / "tabletop-clips"
    clips.mkdir(parents=True)
    (clips / "a.mp4").write_bytes(b"film")
    (tmp_path / "eval" / "tabletop.json").write_text(json.dumps(results()))
    (tmp_path / "eval" / "tabletop-argmax.json").write_text(json.dumps(results(decode="argmax")))
    lines = [{"kind": "train", "step": s, "loss": 5 / s, "lr": 1e-3, "samples_s": 500.0, "data_wait": 0.01, "token_accuracy": 0.2,
              "aux": 0.1, "elapsed": s / 10} for s in range(10, 1000, 10)]  # fmt: skip
    held = [
        {"kind": "heldout", "step": s, "loss": 3.0, "token_accuracy": 0.1, "l1": {"tabletop": {"eef.dx": 0.1, NASTY: 0.2}}}
        for s in (500, 990)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines + held)) + "\n")
    (tmp_path / "config.yaml").write_text(f"run: {{steps: 990}} # {NASTY}\n")
    (tmp_path / "STATUS.json").write_text(json.dumps({"state": "finished", "step": 990, "steps": 990, "seconds": 99.0}))
    policy = {
        "config": {"backbone": {"kind": "nano"}, "chunk": 8, "execute": 4, "decoding": "parallel", "decode": "mean"},
        "embodiments": {"tabletop": {}}, "codec": {"kind": "bins", "bins": 256}, "fingerprint": "cd" * 32,
        "versions": {"torch": "2.15"},
        "provenance": {"instructions": ["x"], "datasets": [
            {"path": NASTY, "robot": "tabletop", "episodes": 3593, "frames": 56499, "fingerprint": "e" * 64}]},
    }  # fmt: skip
    (tmp_path / "policy" / "policy.json").write_text(json.dumps(policy))
    curve = [
        {"step": s, "suite": "tabletop", "group": "touch", "rate": s / 1000, "low": 0.0, "high": 1.0, "n": 20} for s in (0, 500)
    ]
    (tmp_path / "eval" / "curve.jsonl").write_text("\n".join(map(json.dumps, curve)))
    return tmp_path


def test_everything_is_in_one_file(whole):
    page, checker = check(write_report(whole))
    assert write_report(whole) == whole / "report.html" and not (whole / "report.html.part").exists()
    for section in ("verdict", "rollouts", "controls", "tasks", "curves", "setup"):
        assert f'<section id="{section}"' in page
    for text in ("95<span>%</span>", "19 of 20 fresh, [85, 100] %", "3,593 episodes", "swap: does the original", "mujoco",
                 "e" * 16, "Success over training",
                 "Held-out action error, tabletop", "990 of 990 steps", "symbols 0–255, 5 steps",
                 "tabletop (argmax)", "1 min 39 s"):  # fmt: skip
        assert text in page, text
    film = next(a for a in checker.addresses if a.startswith("data:video/mp4;base64,"))
    assert base64.b64decode(film.split(",")[1]) == b"film" and checker.tags["video"] == 1
    assert page.count('data-chart="') == 7 and "This run" not in page


def test_nothing_from_the_run_is_taken_for_html(whole):
    page, _ = check(write_report(whole))
    assert NASTY not in page and "<script>alert" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 6


def test_a_run_that_has_only_begun_gets_a_report_and_other_folders_are_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match="run"):
            write_report(folder)
    (tmp_path / "config.yaml").write_text("run: {out: x}\n")
    page, _ = check(write_report(tmp_path))
    assert "Not yet tried in a simulator" in page and tmp_path.name in page


@pytest.mark.parametrize(
    "gone", ["policy/policy.json", "metrics.jsonl", "config.yaml", "STATUS.json", "eval/tabletop.json", "eval/curve.jsonl"]
)
@pytest.mark.parametrize("how", ["missing", "empty", "cut", "list"])
def test_any_piece_may_be_missing_or_broken(whole, gone, how):
    path = whole / gone
    text = path.read_text()
    match how:
        case "missing":
            path.unlink()
        case "empty":
            path.write_text("")
        case "cut":
            path.write_text(text[: len(text) // 2])
        case "list":
            path.write_text("[]")
    page, _ = check(write_report(whole))
    assert whole.name in page
    if how == "cut" and path.suffix == ".json":
        assert f"{path.name}: not JSON" in page, "broken is said, not passed over"


@pytest.mark.parametrize(
    "broken", [{"file": "none.mp4"}, {"actions": "x"}, {"symbols": None}, {"confidence": [[float("nan")] * 2] * 5}]
)
def test_a_bad_clip_costs_only_itself(whole, broken):
    clips = results()["clips"]
    (whole / "eval/tabletop.json").write_text(json.dumps(results(clips=[clips[0] | broken, clips[0]])))
    page, checker = check(write_report(whole))
    assert checker.tags["video"] == (2 if broken.keys() & {"symbols", "confidence"} else 1)
    assert ("clip of tabletop" in page) == (checker.tags["video"] == 1)


@pytest.mark.parametrize("rows", ["x", [{}], [{"group": "touch", "condition": "policy"}]])
def test_a_file_that_is_no_result_is_named(whole, rows):
    (whole / "eval/odd.json").write_text(json.dumps(results(rows=rows)))
    page, _ = check(write_report(whole))
    assert "odd.json: not the result of an evaluation" in page and '<section id="controls"' in page


def test_films_stop_at_the_budget(whole):
    (whole / "eval/tabletop-clips/a.mp4").write_bytes(bytes(FILM_BYTES // 2))
    (whole / "eval/tabletop.json").write_text(json.dumps(results(clips=results()["clips"] * 5)))
    page, checker = check(write_report(whole))
    assert checker.tags["video"] == 2 and "3 more did not fit" in page and len(page) < 5_000_000


@pytest.mark.parametrize(
    ("state", "said"), [("failed", "failed"), ("preempted", "--resume"), ("diverged", "diverged"), ("running", "still running")]
)
def test_an_unfinished_run_says_so(whole, state, said):
    (whole / "STATUS.json").write_text(json.dumps({"state": state, "step": 7, "steps": 990, "error": f"boom {NASTY}"}))
    page, _ = check(write_report(whole))
    assert "This run" in page and said in page and "boom &lt;script" in page and "7 of 990 steps" in page


def test_metrics_of_a_killed_and_diverged_run(tmp_path):
    lines = ['{"kind": "train", "step": 10, "loss": 2.0, "elapsed": 5}',
             '{"kind": "train", "step": 20, "loss": NaN, "elapsed": 9}',
             "garbage", '{"kind": "train", "step": 10, "loss": 1.0, "elapsed": 3}', '{"kind": "train", "st']  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    run = gather(tmp_path)
    assert [line["step"] for line in run.train] == [10, 20] and run.train[0]["loss"] == 1.0
    assert run.problems == ["metrics.jsonl: 1 unreadable line"]
    check(write_report(tmp_path))


def test_time_adds_up_over_resumes(tmp_path):
    run = gather(tmp_path)
    run.train = [{"elapsed": 10.0}, {"elapsed": 20.0}, {"elapsed": 5.0}, {"elapsed": 7.5}]
    assert training_seconds(run) == 27.5
    assert [duration(s) for s in (4.26, 59.4, 63, 7500)] == ["4.3 s", "59 s", "1 min 3 s", "2 h 5 min"]


def test_parameters_are_counted_from_the_header_alone(tmp_path):
    from safetensors.numpy import save_file

    save_file({"a": np.zeros((3, 4), np.float32), "b": np.zeros((), np.float32)}, tmp_path / "m.safetensors")
    assert count_parameters(tmp_path / "m.safetensors") == 13
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 20)
    assert count_parameters(tmp_path / "bad.safetensors") is None and count_parameters(tmp_path / "none") is None


def test_the_table_explains_every_line():
    assert set(KIND) <= set(MEANING)
    from vla.evaluate import CONDITIONS

    assert {line.split(":")[0] for line in MEANING} == set(CONDITIONS)


def test_heat_strip_is_one_pixel_per_step():
    from PIL import Image

    values = np.array([-1, 0, 1, np.nan])
    picture = Image.open(io.BytesIO(base64.b64decode(heat_strip(values, "value").split(",")[1])))
    pixels = np.asarray(picture)
    assert picture.size == (4, 1) and picture.mode == "RGBA"
    assert pixels[0, 0, 2] > pixels[0, 0, 0] and pixels[0, 2, 0] > pixels[0, 2, 2], "low is blue, high is orange"
    sure = np.asarray(Image.open(io.BytesIO(base64.b64decode(heat_strip(np.array([0.0, 1.0]), "confidence").split(",")[1]))))
    assert sure[0, :, 3].tolist() == [0, 255]
    array = np.arange(48, dtype=np.uint8).reshape(3, 4, 4)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png(array)))), array)


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_cover_the_range(low, span):
    ticks = nice_ticks(low, low + span)
    step = ticks[1] - ticks[0]
    assert (
        2 <= len(ticks) <= 8
        and ticks[0] <= low + 1e-6 * abs(low) + 1e-9
        and ticks[-1] >= low + span - 1e-6 * abs(low + span) - 1e-9
    )
    assert np.allclose(np.diff(ticks), step, rtol=1e-3, atol=1e-9)


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(-1e4, 1e4)), max_size=600), st.booleans())
def test_any_series_can_be_drawn_inside_the_picture(points, log):
    chart = line_chart("t", [Line("a", [x for x, _ in points], [y for _, y in points])], log=log)
    assert (chart == "") == (not points)
    path = re.search(r'points="([^"]*)"', chart)
    if path:
        xy = np.array([[float(v) for v in pair.split(",")] for pair in path[1].split()])
        assert len(xy) <= 240 and np.isfinite(xy).all() and (xy[:, 0] >= 0).all() and (xy[:, 0] <= 420).all()
        assert (xy[:, 1] >= 0).all() and (xy[:, 1] <= 210).all()


def test_smoothing_is_a_running_mean():
    assert smooth([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]
