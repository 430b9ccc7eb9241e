"""`vla data report`: one file that holds everything, says what was found, and works from the keyboard."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from faults import test_check_files  # type: ignore[import-not-found]
from sound_dataset import write_sound

from data_tools.check import open_dataset
from data_tools.report import write_report
from data_tools.report.drawing import strip
from data_tools.report.facts import facts_of
from vla.cli import main
from vla.errors import DataError

EMPTY = {"meta", "link", "input", "br", "img", "rect", "line", "circle", "image", "path"}


class Balanced(HTMLParser):
    """Collects ids, links and attributes; fails on tags that are not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs) -> None:
        if tag not in EMPTY:
            self.open.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(value or "")
            if key == "href" and (value or "").startswith("#"):
                self.links.append((value or "")[1:])
            elif key in ("src", "href"):
                self.sources.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        if tag not in EMPTY:
            assert self.open.pop() == tag


def parsed(path: Path) -> Balanced:
    page = Balanced()
    page.feed(path.read_text())
    assert page.open == []
    return page


def odd(made: list) -> None:
    made[5] = dataclasses.replace(made[5], instruction='put the "cup" <b>away</b>', state=made[5].state + np.float32(5))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sound(tmp_path_factory.mktemp("sound") / "d", lambda made: [*(odd(made) or made), made[3]])


@pytest.fixture(scope="module")
def report(root: Path) -> Path:
    return write_report(root)


def test_it_is_one_file_that_fetches_nothing(report: Path, root: Path):
    page = parsed(report)
    assert report == root / "report.html"
    assert page.sources and all(source.startswith("data:") for source in page.sources)
    text = report.read_text()
    assert not re.search(r"(src|href)=[\"'](?!data:|#)", text) and "@import" not in text and "url(http" not in text
    assert report.stat().st_size < 1_000_000


def test_every_link_leads_somewhere_and_no_name_is_given_twice(report: Path):
    page = parsed(report)
    assert page.links and set(page.links) <= set(page.ids) and len(page.ids) == len(set(page.ids))


def test_every_part_is_there(report: Path):
    text = report.read_text()
    for part in ("findings", "episodes", "unusual", "values", "coverage", "words"):
        assert f'<section id="{part}">' in text
    assert text.count('class="card ep"') == 9
    assert text.count('class="card dim-card"') == 15
    assert "duplicate-episode" in text and "the same numbers as episode 3" in text
    assert "prefers-color-scheme: dark" in text and "prefers-reduced-motion" in text


def test_what_a_dataset_says_is_never_markup(report: Path):
    assert "<b>away</b>" not in report.read_text() and "&lt;b&gt;away" in report.read_text()


def test_cards_can_be_reached_and_played_by_keyboard(report: Path):
    text = report.read_text()
    assert text.count('tabindex="0"') == 9 and "ArrowRight" in text and '"focus"' in text


def test_the_unusual_episode_comes_first_with_its_reason(root: Path):
    facts = facts_of(open_dataset(root, progress=False, keep=4))
    assert facts.unusual[0].episode == 5 and "from the usual place" in facts.unusual[0].reason
    assert facts.scores[5] == max(facts.scores.values())


def test_facts_are_those_of_the_data(root: Path):
    data = open_dataset(root, progress=False, keep=4)
    facts = facts_of(data)
    assert facts.lengths.tolist() == [40] * 9
    assert sum(n for _, n, _ in facts.instructions) == 9 and facts.instructions[0][1] >= facts.instructions[-1][1]
    dx = facts.spreads["action"][0]
    assert dx.name == "eef.x" and dx.limits == pytest.approx((-0.2, 0.2)) and dx.counts.sum() == pytest.approx(1)
    assert dx.quantiles["max"] == pytest.approx(float(data.values("action")[:, 0].max()))
    assert [view.title for view in facts.planes] == ["eef from above", "eef from the side"]
    assert facts.planes[0].heat.sum() > 0.95 * 360 and len(facts.planes[0].starts) == 9


def test_a_strip_holds_every_picture(root: Path):
    film = open_dataset(root, progress=False, keep=6).films["wrist"][0]
    assert film is not None and len(film.thumbs) == 6
    content, n, ratio = strip(film.thumbs)
    assert content[:4] == b"RIFF" and (n, ratio) == (6, 1.0)


def test_films_stay_within_their_budget(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("data_tools.report.sections.MOST_FILMS", 4)
    text = write_report(root, tmp_path / "few.html").read_text()
    assert text.count('class="card ep"') == 4 and "4 of 9 episodes" in text and 'id="ep-8"' in text  # the duplicate stays
    monkeypatch.setattr("data_tools.report.sections.FILM_BYTES", 0)
    assert 'class="card ep"' not in write_report(root, tmp_path / "none.html").read_text()


def test_links_only_to_episodes_that_are_shown(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("data_tools.report.sections.FILM_BYTES", 0)
    page = parsed(write_report(root, tmp_path / "none.html"))
    assert set(page.links) <= set(page.ids)


def test_a_damaged_dataset_gets_a_report_of_its_damage(tmp_path: Path):
    text = write_report(test_check_files.no_footer(tmp_path), tmp_path / "r.html").read_text()
    assert "Do not train on it yet" in text and "Parquet" in text and 'class="card ep"' not in text
    text = write_report(test_check_files.nan_in_action(tmp_path / "nan"), tmp_path / "n.html").read_text()
    assert "not-finite" in text and 'class="card ep"' in text


def test_nothing_is_read_through_a_link_that_leads_out(tmp_path: Path):
    text = write_report(test_check_files.link_outside(tmp_path), tmp_path / "r.html").read_text()
    assert "foreign-path" in text and 'class="card ep"' not in text


def test_the_command_prints_the_path(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "r.html"
    assert main(["data", "report", str(root), "--out", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["report"] == str(out) and said["counts"]["error"] >= 0 and out.is_file()
    assert main(["data", "report", str(root), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == f"report: {out}"


def test_no_such_folder(tmp_path: Path):
    with pytest.raises(DataError):
        write_report(tmp_path / "nowhere")
