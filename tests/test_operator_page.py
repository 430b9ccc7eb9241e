"""The operator's page, in a headless Chromium against a real `vla operate` with a real simulator behind it: what it shows is what
the API says, what is pressed reaches the robot, and a word stays a word."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from operating import Operated, events, folded, operating, post, snapshot
from serving import fetch, until

pytest.importorskip("starlette", reason="the extra serve is not installed")
pytest.importorskip("playwright.sync_api", reason="the extra dev is not installed: playwright")
pytest.importorskip("mujoco", reason="the extra sim is not installed")

from browsing import SCRIPT, Visit, chromium, visiting  # noqa: E402
from playwright.sync_api import Browser, Page, expect  # noqa: E402

from serve.page import HERE, OPERATOR  # noqa: E402

TOKEN = "a-token-of-the-tests"
GOAL, LONG = "touch every cube", "push everything away"
"""Goals of fifty steps or so, and of seventy."""


# --- without a browser ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drilled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operated]:
    """Asks every 12 looks; time is counted in steps, so nothing here is late, however busy the machine."""
    with operating(tmp_path_factory.mktemp("drilled"), "--speed", 0, "--handoff", "drill=12") as server:
        yield server


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operated]:
    """A step a second, and no questions."""
    with operating(tmp_path_factory.mktemp("slow"), "--speed", 0.1, "--handoff", "off") as server:
        yield server


def test_the_page_is_small_files_that_may_only_talk_to_their_station(drilled: Operated):
    total = 0
    for path, (name, kind) in OPERATOR.items():
        status, headers, content = fetch(drilled.address + path)
        assert (status, headers["content-type"], content) == (200, kind, (HERE / name).read_bytes())
        directives = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert directives["default-src"] == "'none'" and directives["frame-ancestors"] == "'none'"
        assert {directives[f"{what}-src"] for what in ("script", "style", "connect")} == {"'self'"}
        assert directives["require-trusted-types-for"] == "'script'"
        total += len(content)
    assert total < 72_000


def test_the_page_makes_no_html_and_runs_no_words():
    scripts = "".join((HERE / name).read_text() for name, kind in OPERATOR.values() if "javascript" in kind)
    making = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|DOMParser|srcdoc"
    assert not re.search(making, scripts)
    assert not re.search(r"\son\w+=|style=|javascript:|https?:", (HERE / "operator.html").read_text())


# --- with one ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


Operate = Callable[..., Operated]


@pytest.fixture()
def operate(tmp_path: Path) -> Iterator[Operate]:
    """Starts a station of the test's own, which outlives the pages that look at it."""
    with ExitStack() as stack:
        yield lambda *flags, **options: stack.enter_context(operating(tmp_path, *flags, **options))


@pytest.fixture()
def visit(browser: Browser, operate: Operate) -> Iterator[Visit]:
    """Pages, closed before the stations of the test's own end."""
    with visiting(browser) as opened:
        yield opened


@pytest.fixture()
def idle() -> Iterator[Callable[[Operated], str]]:
    """The address of a station where nothing runs, before and after the test."""
    used: list[str] = []

    def stopped(server: Operated) -> str:
        used.append(server.address)
        post(server.address, "stop")
        return server.address

    yield stopped
    for address in used:
        post(address, "stop")


Idle = Callable[[Operated], str]


def at_rest(page: Page) -> None:
    """Waits until the page knows that nothing runs."""
    expect(page.locator("#how")).to_have_attribute("data-state", re.compile("idle|done|stopped|failed"))
    expect(page.locator("#send")).to_have_text("Run")


def run(page: Page, goal: str = GOAL) -> None:
    at_rest(page)
    page.get_by_label("Goal", exact=True).fill(goal)
    page.keyboard.press("Enter")


def asked(page: Page, number: int | None = None) -> int:
    """Waits for a question, later than `number`; its number."""
    shown = page.locator("#question")
    expect(shown).to_be_visible()
    if number is not None:
        expect(shown).not_to_have_attribute("data-number", str(number))
        expect(shown).to_be_visible()
    return int(shown.get_attribute("data-number") or "0")


def rows(page: Page, kind: str) -> list[str]:
    return page.locator(f'#timeline [data-kind="{kind}"] .what').all_inner_texts()


def test_an_instruction_is_typed_and_the_arm_follows_it(operate: Operate, visit: Visit):
    server = operate("--speed", 0, "--handoff", "off")
    page = visit(server.address)
    expect(page.locator("#name")).to_have_text("the scripted expert")
    camera = page.locator("figure[data-camera=front]")
    expect(camera).to_have_attribute("data-frame", re.compile(r"\d+"))
    before, number = camera.locator("img").screenshot(), int(camera.get_attribute("data-frame") or "0")
    offered = page.locator("#known option").evaluate_all("(all) => all.map((one) => one.value)")
    assert offered == snapshot(server.address)["goals"] and GOAL in offered
    run(page)
    expect(page.locator("#how")).to_have_text(re.compile("done, goal reached"))
    now = snapshot(server.address)
    assert (now["run"]["state"], now["run"]["success"], now["run"]["goal"]) == ("done", True, GOAL)
    assert int(camera.get_attribute("data-frame") or "0") > number and camera.locator("img").screenshot() != before
    expect(page.locator("#counts")).to_contain_text(f"run 1, step {now['run']['step']},")
    expect(page.locator("#steps li[data-part=done]")).to_have_count(4)
    wanted = [text for text in (*now["run"]["plan"]["done"], now["run"]["plan"]["now"]) if text]
    assert page.locator("#steps .what").all_inner_texts() == wanted
    # What happened has its row, newest first.
    happened = folded(events(server.address))
    expect(page.locator("#timeline li")).to_have_count(len(happened))
    kinds = page.locator("#timeline li").evaluate_all("(all) => all.map((one) => one.dataset.kind)")
    assert kinds == [event["kind"] for event in reversed(happened)]
    # And the newest numbers stand beside their lines.
    tick = [event for event in events(server.address) if event["kind"] == "tick"][-1]["ticks"][-1]
    names = [dim["name"] for dim in now["robot"]["action"]]
    assert page.locator("#strips text.name").all_text_contents() == ["doubt", "confidence", *names]
    shown = tick["action"] or [None] * len(names)
    values = ["\u2013" if v is None else f"{v:.2f}".replace("-0.00", "0.00").replace("-", "\u2212") for v in shown]
    for i, value in enumerate(values, 2):
        expect(page.locator("#strips text.value").nth(i)).to_have_text(value)
    assert all(page.locator("#strips path.line").evaluate_all("(all) => all.slice(1).map((p) => p.getAttribute('d'))"))


KEYS = {"go_on": "1", "instruct": "2", "take_over": "3", "retreat": "4", "stop": "5"}
"""Of answers; moving back is not offered where nothing was done yet."""


def test_a_hand_off_is_answered_by_key_by_button_and_by_words(drilled: Operated, visit: Visit, idle: Idle):
    address = idle(drilled)
    page = visit(address)
    run(page, LONG)
    first = asked(page)
    shown = page.locator("#question")
    expect(shown).to_be_focused()
    expect(page.locator("#how")).to_have_text(re.compile("asks you"))
    expect(page.locator("#call")).to_contain_text("The robot asks you")
    assert shown.get_attribute("role") == "alertdialog" and page.locator("#call").get_attribute("role") == "alert"
    now = snapshot(address)
    question = now["question"]
    assert (now["run"]["state"], question["number"]) == ("asking", first)
    expect(page.locator("#ask-value")).to_have_text("drill 13, asks above 12")
    expect(page.locator("#ask-why strong")).to_have_text(question["instruction"])
    offered = page.locator("#answers button").evaluate_all("(all) => all.map((one) => [one.dataset.key, one.value])")
    assert [name for _, name in offered] == question["answers"]
    assert {name: key for key, name in offered}.items() <= KEYS.items()
    assert page.locator("#answers kbd").all_inner_texts() == [key for key, _ in offered]

    page.keyboard.press("1")
    second = asked(page, first)
    assert rows(page, "answer")[0] == "answer go on, by person"

    page.get_by_role("button", name="Take over").click()
    expect(page.locator("#how")).to_have_text(re.compile("done, goal reached"))
    assert rows(page, "answer")[0] == "answer take over, by person"
    expect(page.get_by_label("Goal", exact=True)).to_be_focused()  # where the person was before

    run(page, LONG)
    third = asked(page)
    assert third > second

    page.keyboard.press("2")  # nothing typed yet: to the field, and digits are text there
    field = page.get_by_label("Another instruction")
    expect(field).to_be_focused()
    page.keyboard.type("1 2 3")
    expect(field).to_have_value("1 2 3")
    assert snapshot(address)["question"]["number"] == third
    field.fill("touch the red cube")
    page.keyboard.press("Enter")
    fourth = asked(page, third)
    assert rows(page, "answer")[0] == "answer instruct: touch the red cube, by person"

    page.keyboard.press("5")
    expect(shown).to_be_hidden()
    expect(page.locator("#how")).to_have_text(re.compile("stopped"))
    assert snapshot(address)["run"]["state"] == "stopped"
    said = {event["question"]: event["answer"] for event in events(address) if event["kind"] == "answer"}
    assert {said[number] for number in (first, second, third)} == {"go_on", "take_over", "instruct"} and said[third] == "instruct"
    written = (drilled.folder / "answers.jsonl").read_text().splitlines()
    answers = {line["question"]: (line["answer"], line["told"]) for line in map(json.loads, written)}
    assert answers[third] == ("instruct", "touch the red cube") and answers[fourth] == ("stop", "")

    page.get_by_label("Kinds shown").select_option(label="questions")
    visible = page.locator("#timeline li:not([hidden])")
    kinds = visible.evaluate_all("(all) => all.map((one) => one.dataset.kind)")
    assert set(kinds) == {"question", "answer"}
    page.get_by_label("Filter by words").fill("RED cube")
    expect(page.locator("#found")).to_have_text(re.compile(r"^\d+ of \d+$"))
    texts = visible.evaluate_all("(all) => all.map((one) => one.textContent.toLowerCase())")
    assert texts and len(texts) < len(kinds)
    page.get_by_label("Filter by words").fill("")
    page.get_by_label("Kinds shown").select_option(label="everything")
    row = page.locator("#timeline [data-kind=answer]").filter(has_text="instruct: touch the red cube")
    row.locator("summary").click()
    expect(row.locator("dl")).to_be_visible()
    fields = dict(zip(row.locator("dt").all_inner_texts(), row.locator("dd").all_inner_texts(), strict=True))
    event = next(one for one in events(address) if one["kind"] == "answer" and one["question"] == third)
    assert {key: fields[key] if isinstance(event[key], str) else json.loads(fields[key]) for key in fields} == event


def test_who_took_over_hands_back_by_key(operate: Operate, visit: Visit):
    address = operate("--speed", 0.1, "--handoff", "drill=1").address  # a step a second: the demonstrator takes a while
    page = visit(address)
    run(page)
    asked(page)
    page.keyboard.press("3")
    expect(page.locator("#hold")).to_contain_text("A demonstrator drives: touch the")
    back = page.get_by_role("button", name="Hand back")
    expect(back).to_be_focused()
    assert snapshot(address)["run"]["by"] == "person"
    page.keyboard.press("h")
    expect(page.locator("#timeline")).to_contain_text("the policy drives again: taken back")
    expect(back).to_be_hidden()
    assert snapshot(address)["run"]["by"] != "person"


def test_another_person_may_answer(drilled: Operated, visit: Visit, idle: Idle):
    address = idle(drilled)
    page = visit(address)
    run(page)
    number = asked(page)
    post(address, "answer", question=number, answer="stop")
    expect(page.locator("#question")).to_be_hidden()
    expect(page.locator("#how")).to_have_text(re.compile("stopped"))
    assert fetch(f"{address}/v1/station/answer", {"question": number, "answer": "go_on"})[0] == 409


def test_typing_is_not_lost_to_a_question(operate: Operate, visit: Visit):
    address = operate("--speed", 0.1, "--handoff", "drill=7").address  # a step a second: time to begin to type
    page = visit(address)
    run(page)
    field = page.locator("#words")
    expect(page.locator("#send")).to_have_text("Say")
    expect(field).to_have_value("")
    page.keyboard.type("touch the ")
    asked(page)
    expect(page.locator("#call")).to_contain_text("Your typing is kept")
    expect(field).to_be_focused()
    page.keyboard.type("red cube 1")  # no answer, but a digit
    expect(field).to_have_value("touch the red cube 1")
    assert snapshot(address)["run"]["state"] == "asking"
    page.keyboard.press("Backspace")
    page.keyboard.press("Backspace")
    page.keyboard.press("Enter")
    expect(page.locator("#news")).to_have_text("Said: touch the red cube")
    expect(field).to_have_value("")
    expect(page.locator("#question")).to_be_focused()
    page.keyboard.press("5")
    expect(page.locator("#how")).to_have_text(re.compile("stopped"))


def test_stop_by_escape_by_space_and_by_button(slow: Operated, visit: Visit, idle: Idle):
    address = idle(slow)
    page = visit(address, but="status of 409 ")  # a run that has just been stopped may not be quite over
    how = page.locator("#how")

    def begin() -> None:
        number = snapshot(address)["run"]["number"]
        run(page)
        expect(page.locator("#counts")).to_contain_text(f"run {number + 1},")
        expect(how).to_have_text(re.compile("running"))

    begin()
    page.keyboard.type("not so ")  # a space is text here
    expect(page.locator("#words")).to_have_value("not so ")
    assert snapshot(address)["run"]["state"] == "running"
    page.keyboard.press("Escape")  # but Escape always stops
    expect(how).to_have_text(re.compile("stopped"))
    assert snapshot(address)["run"]["state"] == "stopped"
    # What was meant for the run is not taken for the next goal by the Enter that comes too late.
    page.keyboard.press("Enter")
    expect(page.locator("#news")).to_contain_text("The run ended meanwhile")
    assert snapshot(address)["run"]["state"] == "stopped"
    begin()
    page.locator("#strips").focus()
    page.keyboard.press("Space")
    expect(how).to_have_text(re.compile("stopped"))
    begin()
    page.get_by_role("button", name="Stop").click()
    expect(how).to_have_text(re.compile("stopped"))
    assert snapshot(address)["run"]["state"] == "stopped"


def test_frames_are_not_fetched_while_nobody_looks(drilled: Operated, visit: Visit, idle: Idle):
    page = visit(idle(drilled))
    expect(page.locator("figure[data-camera=front]")).to_have_attribute("data-frame", re.compile(r"\d+"))
    frames: list[str] = []
    page.evaluate("""() => { Object.defineProperty(document, "hidden", { value: true, configurable: true });
      document.dispatchEvent(new Event("visibilitychange")); }""")
    page.on("request", lambda request: frames.append(request.url) if "/frame/" in request.url else None)
    for _ in range(3):  # looks at the station go on: a question must be seen in the tab's title
        with page.expect_request("**/v1/station"):
            pass
    assert not frames
    with page.expect_request("**/v1/station/frame/front**"):
        page.evaluate("""() => { Object.defineProperty(document, "hidden", { value: false });
          document.dispatchEvent(new Event("visibilitychange")); }""")


def test_a_refusal_is_shown_in_the_stations_words(drilled: Operated, visit: Visit, idle: Idle):
    address = idle(drilled)
    page = visit(address, but="status of 400 ")
    run(page, SCRIPT)
    trouble = page.locator("#trouble")
    expect(trouble).to_contain_text("Refused")
    error = json.loads(fetch(f"{address}/v1/station/run", {"goal": SCRIPT})[2])["error"]
    expect(trouble).to_contain_text(error["found"])
    expect(trouble).to_contain_text(error["fix"])
    assert page.locator("#words").input_value() == SCRIPT  # to be mended, not to be typed again
    page.get_by_role("button", name="Dismiss").click()
    expect(trouble).to_be_empty()


def test_words_stay_words(drilled: Operated, visit: Visit):
    """Whatever a station says: names, goals, reasons, errors, events."""
    plan = {"done": [SCRIPT], "now": SCRIPT, "remaining": [SCRIPT], "reason": SCRIPT, "confidence": 0.5}
    question = {"number": 1, "say": SCRIPT, "reason": SCRIPT, "score": SCRIPT, "value": 2.0, "threshold": 1.0,
                "instruction": SCRIPT, "seconds": 1.0, "answers": ["go_on", SCRIPT]}  # fmt: skip
    station = {
        "name": SCRIPT, "robot": {"key": SCRIPT, "hz": 10.0, "cameras": [SCRIPT],
                                  "action": [{"name": SCRIPT, "unit": SCRIPT, "low": -1.0, "high": 1.0}]},
        "run": {"number": 1, "state": "failed", "goal": SCRIPT, "instruction": SCRIPT, "valid_for": 1.0, "hold": SCRIPT,
                "step": 1, "seconds": 1.0, "success": None, "error": SCRIPT, "by": SCRIPT, "plan": plan},
        "question": question, "goals": [SCRIPT], "instructions": [SCRIPT],
        "incidents": {"written": 0, "corrections": 0, "lost": 0, "folder": SCRIPT},
        "loop": {"jitter_ms_p50": None, "jitter_ms_p99": None, "missed": 0, "ticks": 0, "planner_ms_p50": None}, "last": 7,
    }  # fmt: skip
    said = [
        {"kind": "run", "state": SCRIPT, "goal": SCRIPT, "error": SCRIPT}, {"kind": "plan", **plan},
        {"kind": "event", "what": SCRIPT}, {"kind": "question", **question, "question": 1},
        {"kind": "answer", "answer": SCRIPT, "instruction": SCRIPT, "by": SCRIPT},
        {"kind": "incident", "what": SCRIPT, "reason": SCRIPT, "file": SCRIPT}, {"kind": SCRIPT, SCRIPT: SCRIPT},
    ]  # fmt: skip
    stream = "".join(f"id: {n}\ndata: {json.dumps({**event, 'number': n, 't': 1.0})}\n\n" for n, event in enumerate(said, 1))
    error = {"error": dict.fromkeys(("code", "where", "found", "expected", "fix"), SCRIPT)}

    def prepare(page: Page) -> None:
        page.route("**/v1/station", lambda route: route.fulfill(json=station))
        page.route("**/v1/station/events**", lambda route: route.fulfill(content_type="text/event-stream", body=stream))
        page.route("**/v1/station/answer", lambda route: route.fulfill(status=409, json=error))
        page.route("**/v1/station/frame/**", lambda route: route.fulfill(status=404, body=SCRIPT))

    page = visit(drilled.address, but="status of (404|409) ", prepare=prepare)
    expect(page.locator("#timeline li")).to_have_count(len(said))
    expect(page.locator("#name")).to_have_text(SCRIPT)
    for place in ("#ask-title", "#ask-why", "#answers", "#hold", "#steps", "#plan-why", "figcaption", "#robot", "#strips"):
        expect(page.locator(place)).to_contain_text(SCRIPT)
    page.locator('#timeline [data-kind="incident"] summary').click()
    expect(page.locator('#timeline [data-kind="incident"] dd').filter(has_text=SCRIPT)).to_have_count(3)
    page.keyboard.press("6")
    page.locator("#question").focus()
    page.keyboard.press("6")
    expect(page.locator("#trouble")).to_contain_text(SCRIPT)
    assert page.locator("script").count() == 1 and page.locator("img").count() == 1


FOCUSED = """() => {
  const node = document.activeElement;
  const name = node.getAttribute("aria-label") ?? node.labels?.[0]?.innerText ?? node.innerText;
  return [name, getComputedStyle(node).outlineStyle !== "none"]; }"""
"""(name of what has the focus, whether one sees that it has)."""


def test_the_keyboard_is_enough(drilled: Operated, visit: Visit, idle: Idle):
    address = idle(drilled)
    page = visit(address)
    at_rest(page)

    def tab() -> str:
        page.keyboard.press("Tab")
        name, seen = page.evaluate(FOCUSED)
        assert seen, f"nobody sees that the focus is on {name}"
        return re.sub(r"\s+", " ", name.strip())

    assert [tab() for _ in range(2)] == ["Skip to the goal", "■ Stop Esc"]
    assert tab() == "Goal"
    page.keyboard.type(LONG)
    page.keyboard.press("Enter")
    number = asked(page)
    expect(page.locator("#question")).to_be_focused()
    assert tab() == "1 Go on"
    page.keyboard.press("Enter")
    asked(page, number)
    assert rows(page, "answer")[0] == "answer go on, by person"
    expect(page.locator("#question")).to_be_focused()
    answers = ["1 Go on", "2 Tell it", "Another instruction", "3 Take over", "4 Move back", "5 End run"]
    assert [tab() for _ in range(8)] == [*answers, "Say something to the planner", "Say"]
    page.keyboard.press("Escape")
    expect(page.locator("#how")).to_have_text(re.compile("stopped"))
    page.locator("#send").focus()
    assert tab().startswith("Actions, confidence and doubt")
    moment = page.locator("#strips .moment")
    page.keyboard.press("ArrowLeft")
    expect(moment).to_have_attribute("d", re.compile("^M"))
    before = moment.get_attribute("d") or ""
    for _ in range(20):  # ten seconds further back
        page.keyboard.press("ArrowLeft")
    expect(moment).not_to_have_attribute("d", before)
    page.keyboard.press("End")
    expect(moment).to_have_attribute("d", "")
    assert [tab() for _ in range(2)] == ["Kinds shown", "Filter by words"]
    assert "run stopped" in tab()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    row = page.locator("#timeline li").nth(1)
    expect(row.locator("dl")).to_be_visible()
    expect(row.locator("summary")).to_be_focused()


def test_a_narrow_dark_screen(drilled: Operated, visit: Visit, idle: Idle):
    address = idle(drilled)
    page = visit(address, viewport={"width": 360, "height": 740}, color_scheme="dark")
    run(page)
    asked(page)
    expect(page.locator("#ask-title")).to_be_in_viewport()
    for button in page.locator("#answers button").all():
        expect(button).to_be_in_viewport()
    assert page.evaluate("document.scrollingElement.scrollWidth") == 360
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
    page.locator("#timeline").scroll_into_view_if_needed()
    expect(page.get_by_role("button", name="Stop")).to_be_in_viewport()  # wherever one has scrolled to


def test_one_screen_is_enough(drilled: Operated, visit: Visit, idle: Idle):
    page = visit(idle(drilled))
    run(page)
    asked(page)
    assert page.evaluate("[document.scrollingElement.scrollWidth, document.scrollingElement.scrollHeight]") == [1280, 800]
    last = ("#steps li >> nth=-1", "#facts dd >> nth=-1")
    for place in ("#stop", "#question", "#cameras img", "#words", "#news", "#strips svg", *last):
        expect(page.locator(place)).to_be_in_viewport(ratio=1)


def test_a_station_that_died_is_missed_and_its_return_is_noticed(tmp_path: Path, operate: Operate, visit: Visit):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    flags = ("--speed", 0, "--handoff", "drill=12")
    with operating(tmp_path, *flags, port=port) as first:
        page = visit(first.address, but=r"ERR_CONNECTION|ERR_INCOMPLETE|ERR_EMPTY|Failed to load")
        run(page)
        asked(page)
        expect(page.locator("#link")).to_have_text(re.compile("live"))
        first.leave = None
        first.process.kill()
    lost = page.locator("#lost")
    expect(lost).to_contain_text("No connection to the station since")
    expect(page.locator("#link")).to_have_text(re.compile("no connection"))
    assert lost.get_attribute("role") == "alert" and "no connection" in page.title()
    page.keyboard.press("Escape")
    expect(page.locator("#trouble")).to_contain_text("The stop did not arrive")
    second = operate(*flags, port=port)
    expect(lost).to_be_empty()
    expect(page.locator("#link")).to_have_text(re.compile("live"))
    expect(page.locator("#question")).to_be_hidden()
    expect(page.locator("#trouble")).to_be_empty()  # the stop arrived after all
    expect(page.locator("#timeline [data-kind=page]").filter(has_text="was started again")).to_have_count(1)
    before = len(rows(page, "question"))
    run(page)
    asked(page)
    expect(page.locator("#timeline [data-kind=question]")).to_have_count(before + 1)
    assert len([event for event in events(second.address) if event["kind"] == "question"]) == 1


def test_what_happened_while_the_network_was_away_is_heard_afterwards(operate: Operate, visit: Visit):
    address = operate("--speed", 0, "--handoff", "drill=12").address
    page = visit(address, but=r"ERR_INTERNET_DISCONNECTED|ERR_FAILED|ERR_NETWORK|Failed to load")
    expect(page.locator("#link")).to_have_text(re.compile("live"))
    page.context.set_offline(True)
    expect(page.locator("#lost")).to_contain_text("No connection")
    post(address, "run", goal=GOAL)
    number = until(lambda: snapshot(address)["question"])["number"]
    page.context.set_offline(False)
    expect(page.locator("#lost")).to_be_empty()
    assert asked(page) == number
    expect(page.locator("#timeline li:not([data-kind=page])")).to_have_count(len(folded(events(address))))  # each once


def test_a_browser_is_asked_for_the_token(operate: Operate, visit: Visit, tmp_path: Path):
    tokens = tmp_path / "tokens"
    tokens.write_text(TOKEN)
    server = operate("--token-file", tokens, "--speed", 0, "--handoff", "drill=12")
    page = visit(server.address, but="status of 401 ", http_credentials={"username": "anybody", "password": TOKEN})
    expect(page.locator("#link")).to_have_text(re.compile("live"))
    run(page)
    asked(page)
    page.keyboard.press("5")
    expect(page.locator("#how")).to_have_text(re.compile("stopped"))
    assert [fetch(server.address + path)[0] for path in (*OPERATOR, "/v1/station")] == [401] * (len(OPERATOR) + 1)
