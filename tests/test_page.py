"""The page at `/`, in a headless Chromium against a real server: what it shows is what the API says, and a word stays a word."""

from __future__ import annotations

import base64
import json
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from serving import fetch, serving, started

pytest.importorskip("starlette", reason="the extra serve is not installed")
pytest.importorskip("playwright.sync_api", reason="the extra dev is not installed: playwright")

from browsing import SCRIPT, Visit, chromium, visiting  # noqa: E402
from playwright.sync_api import Browser, Locator, Page, expect  # noqa: E402

from serve.page import FILES, HERE  # noqa: E402

TOKEN = "a-token-of-the-tests"
PATIENT = ("--deadline", "60")


def act(address: str, robot: str, images: dict[str, bytes], state: list[float], instruction: str) -> Any:
    pictures = {camera: base64.b64encode(data).decode() for camera, data in images.items()}
    body = {"robot": robot, "images": pictures, "state": state, "instruction": instruction}
    return json.loads(fetch(f"{address}/v1/act", body)[2])


# --- without a browser ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_cameras(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    config = tmp_path_factory.mktemp("config") / "serve.yaml"
    config.write_text("message_mib: 1")  # so that a picture that is too large need not be large
    with serving("null:tabletop_wrist", "--config", config, *PATIENT) as address:
        yield address


def test_the_page_is_three_small_files_that_may_only_talk_to_their_server(two_cameras: str):
    total = 0
    for path, (name, kind) in FILES.items():
        status, headers, content = fetch(two_cameras + path)
        assert (status, headers["content-type"], content) == (200, kind, (HERE / name).read_bytes())
        directives = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert directives["default-src"] == "'none'" and directives["frame-ancestors"] == "'none'"
        assert {directives[f"{what}-src"] for what in ("script", "style", "connect")} == {"'self'"}
        assert directives["img-src"] == "'self' blob: data:"
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
        assert "no-cache" in headers["cache-control"]
        again, unchanged, nothing = fetch(two_cameras + path, headers={"if-none-match": f'"another", W/{headers["etag"]}'})
        assert (again, nothing, unchanged["etag"]) == (304, b"", headers["etag"])
        assert fetch(two_cameras + path, headers={"if-none-match": '"another"'})[0] == 200
        total += len(content)
    assert total < 40_000


def test_the_page_makes_no_html_and_runs_no_words():
    script, html = (HERE / "page.js").read_text(), (HERE / "index.html").read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|DOMParser|srcdoc", script)
    assert not re.search(r"\son\w+=|style=|javascript:|https?:", html)


# --- with one ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture()
def visit(browser: Browser) -> Iterator[Visit]:
    with visiting(browser) as opened:
        yield opened


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pictures a user may have, and some that nobody should have."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    frame = Image.fromarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8))
    made = {name: root / name for name in ("front.png", "wrist.webp", "other.jpg", "bomb.png", "fat.png", "words.png")}
    frame.save(made["front.png"])
    frame.save(made["wrist.webp"], lossless=True)
    frame.save(made["other.jpg"])

    def block(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = block(b"IHDR", struct.pack(">IIBBBBB", 12_000, 12_000, 8, 2, 0, 0, 0))
    made["bomb.png"].write_bytes(b"\x89PNG\r\n\x1a\n" + header + block(b"IDAT", zlib.compress(bytes(99))) + block(b"IEND", b""))
    made["fat.png"].write_bytes(made["front.png"].read_bytes() + bytes(1 << 20))
    made["words.png"].write_text("no picture")
    return made


def give(page: Page, camera: str, path: Path) -> None:
    page.get_by_label(camera, exact=True).set_input_files(path)
    expect(page.locator("#news")).to_contain_text(f"{camera}: {path.name}")


DROPPED = """(files) => { const all = new DataTransfer();
  for (const [name, type, data] of files) {
    all.items.add(new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], name, { type }));
  }
  return all; }"""
PASTED = """(node, data) => node.dispatchEvent(
  new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true }))"""


def transfer(page: Page, *paths: Path) -> Any:
    types = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp"}
    said = [[p.name, types[p.suffix], base64.b64encode(p.read_bytes()).decode()] for p in paths]
    return page.evaluate_handle(DROPPED, said)


def numbers(cells: Locator) -> list[Any]:
    return [None if text == "none" else float(text) for text in cells.evaluate_all("(all) => all.map((c) => c.dataset.value)")]


def compare(page: Page, reply: Any) -> None:
    """What the page shows is what the API said."""
    expect(page.locator("#chunk")).to_be_visible()
    steps, dims = len(reply["actions"]), len(reply["names"])
    assert numbers(page.locator("#numbers td[data-value]")) == [v for row in reply["actions"] for v in row]
    shown = numbers(page.locator("#confidence td"))
    assert shown == [reply["confidence"][t][d] for d in range(dims) for t in range(steps)]
    assert page.locator("#confidence tbody th").all_inner_texts() == reply["names"]
    lines = page.locator("#lines figure")
    expect(lines).to_have_count(dims)
    for d in range(dims):  # the drawn line is where the numbers are, between the lines of the limits -1 and 1
        figure = lines.nth(d)
        limits = figure.locator(".limit").evaluate_all("(all) => all.map((line) => line.getAttribute('y1'))")
        high, low = sorted(map(float, limits))
        drawn = figure.locator("polyline").evaluate_all("(all) => all.reverse().map((p) => p.getAttribute('points')).join(' ')")
        heights = [float(pair.split(",")[1]) for pair in drawn.split()]
        heights = heights[: 2 * reply["execute"]] + heights[2 * (reply["execute"] + (reply["execute"] < steps)) :]
        values = [row[d] for row in reply["actions"] for _ in range(2)]  # a step begins and ends
        assert np.allclose(heights, low + (np.array(values) + 1) / 2 * (high - low), atol=1e-3)


def test_dropped_pictures_are_acted_on_and_the_answer_is_the_servers(two_cameras: str, files: dict[str, Path], visit: Visit):
    page = visit(two_cameras)
    expect(page.locator("#name")).to_have_text("null:tabletop_wrist")
    # Two at once, beside their places: each goes where its name says. WebP is nothing the server reads, so it goes as PNG.
    page.locator("body").dispatch_event("drop", {"dataTransfer": transfer(page, files["wrist.webp"], files["front.png"])})
    expect(page.locator('[data-camera="front"] small')).to_have_text(re.compile("64 × 48, PNG"))
    expect(page.locator('[data-camera="wrist"] small')).to_have_text(re.compile("64 × 48, as PNG"))
    page.get_by_label("Instruction").fill("touch the red cube")
    with page.expect_request("**/v1/act") as asked:
        page.get_by_role("button", name="Act").click()
    body: Any = asked.value.post_data_json
    sent = {camera: base64.b64decode(text) for camera, text in body["images"].items()}
    assert sent["front"] == files["front.png"].read_bytes()
    assert sent["wrist"].startswith(b"\x89PNG")
    assert body["state"] == [0, 0, 0.45, 0.5] and body["robot"] == "tabletop_wrist" and "adapter" not in body
    compare(page, act(two_cameras, "tabletop_wrist", sent, body["state"], "touch the red cube"))
    expect(page.locator("#facts")).to_contain_text("8 of 8 steps, 0.8 s")
    expect(page.locator("#said")).to_contain_text("8 steps in")
    page.locator('#confidence td[data-dim="3"][data-step="2"]').hover()
    expect(page.locator("#readout")).to_have_text("step 2, 0.2 s: gripper.close 0 (100.0 %) ")


def test_a_policy_answers_a_real_frame(checkout: Path, table: Any, visit: Visit, tmp_path: Path):
    observation, _ = table.reset(seed=900_000)
    picture = tmp_path / "look.png"
    Image.fromarray(observation["images"]["front"]).save(picture)
    state = [round(float(v), 4) for v in observation["state"]]
    with serving(str(checkout / "models" / "nano-base"), "--robot", "tabletop", *PATIENT) as address:
        page = visit(address)
        page.get_by_label("Robot", exact=True).select_option("metaworld_sawyer")
        expect(page.get_by_label("corner2", exact=True)).to_be_attached()
        page.get_by_label("Robot", exact=True).select_option("tabletop")
        page.locator('[data-camera="front"] input').dispatch_event("drop", {"dataTransfer": transfer(page, picture)})
        text = page.evaluate_handle("(text) => { const d = new DataTransfer(); d.setData('text', text); return d; }", str(state))
        page.get_by_label("eef.x").evaluate(PASTED, text)
        expect(page.get_by_label("gripper.opening")).to_have_value(str(state[3]).removesuffix(".0"))
        page.get_by_label("Instruction").fill("push the red cube left")
        page.get_by_label("Instruction").press("Enter")
        reply = act(address, "tabletop", {"front": picture.read_bytes()}, state, "push the red cube left")
        compare(page, reply)
        assert len({v for row in reply["confidence"] for v in row}) > 4 and len({v for row in reply["actions"] for v in row}) > 4
        expect(page.locator("#facts")).to_contain_text(f"nano-base, {reply['policy'][:12]}")
        expect(page.locator("#facts")).to_contain_text(f"{reply['execute']} of 8 steps")
        boundary = page.locator("#lines .again").first
        x0, x1 = (float(page.locator("#lines .grid").first.get_attribute(end) or "nan") for end in ("x1", "x2"))
        assert abs((float(boundary.get_attribute("x1") or "nan") - x0) / (x1 - x0) - reply["execute"] / 8) < 1e-6


@pytest.mark.parametrize(("name", "found"), [("bomb.png", "12000 x 12000 pixels"), ("fat.png", "bytes")])
def test_a_refusal_is_shown_in_the_servers_words(two_cameras: str, files: dict[str, Path], visit: Visit, name: str, found: str):
    page = visit(two_cameras, but="status of 413 ")
    give(page, "wrist", files["other.jpg"])
    give(page, "front", files[name])
    page.get_by_label("Instruction").fill("touch the red cube")
    with page.expect_response("**/v1/act") as answered:
        page.get_by_role("button", name="Act").click()
    assert answered.value.status == 413
    shown = page.get_by_role("alert")
    expect(shown).to_contain_text("No answer: too_large")
    assert shown.locator("dt").all_inner_texts() == ["where", "found", "expected", "fix"]
    words = shown.locator("dd").all_inner_texts()
    assert words == [answered.value.json()["error"][part] for part in ("where", "found", "expected", "fix")]
    assert found in words[1] and "at most" in words[2]
    expect(page.locator("#chunk")).to_be_hidden()
    give(page, "front", files["front.png"])  # and from there it goes on
    page.get_by_role("button", name="Act").click()
    expect(page.locator("#chunk")).to_be_visible()
    expect(shown).to_be_empty()


def test_what_the_page_itself_finds_wrong(two_cameras: str, files: dict[str, Path], visit: Visit):
    page = visit(two_cameras, but="status of 422 ")
    give(page, "front", files["front.png"])
    page.get_by_label("front", exact=True).set_input_files(files["words.png"])
    shown = page.get_by_role("alert")
    expect(shown).to_contain_text("words.png")
    # Nor is the picture before it still there, which nobody means any more.
    expect(page.locator('[data-camera="front"] small')).to_contain_text("recorded at 64 × 64")
    page.get_by_label("eef.y").fill("")
    page.get_by_role("button", name="Act").click()
    expect(shown).to_contain_text("eef.y")
    expect(page.get_by_label("eef.y")).to_be_focused()
    page.get_by_label("eef.y").fill("0.5")
    page.keyboard.press("Enter")
    expect(shown).to_contain_text("no picture of camera 'front', 'wrist'")


def test_pasted_pictures_go_where_the_focus_is_or_where_none_is(two_cameras: str, files: dict[str, Path], visit: Visit):
    page = visit(two_cameras)
    page.get_by_label("wrist", exact=True).evaluate(PASTED, transfer(page, files["other.jpg"]))
    expect(page.locator('[data-camera="wrist"] small')).to_have_text(re.compile("JPEG"))
    page.get_by_label("Instruction").evaluate(PASTED, transfer(page, files["other.jpg"]))
    expect(page.locator('[data-camera="front"] small')).to_have_text(re.compile("JPEG"))
    page.get_by_role("button", name="Remove the picture of front").click()
    expect(page.locator('[data-camera="front"] small')).to_contain_text("recorded at")
    expect(page.get_by_label("front", exact=True)).to_be_focused()


def test_words_stay_words(two_cameras: str, files: dict[str, Path], visit: Visit):
    """Of a user, and of a server: names, units, reasons, errors."""
    page = visit(two_cameras)
    give(page, "front", files["front.png"])
    give(page, "wrist", files["front.png"])
    page.get_by_label("Instruction").fill(SCRIPT)
    page.get_by_label("Instruction").press("Enter")
    expect(page.locator("#chunk")).to_be_visible()
    assert page.locator("script").count() == 1 and page.locator("img").count() == 2

    channel = {"name": SCRIPT, "dims": [SCRIPT], "convention": SCRIPT, "unit": SCRIPT, "low": [-1], "high": [1]}
    robot = {"cameras": {SCRIPT: {"width": SCRIPT, "height": 1}}, "state": [channel], "action": [channel], "control_hz": 1}
    info = {"name": SCRIPT, "policy": SCRIPT, "robots": {SCRIPT: robot}, "adapters": [SCRIPT], "instructions": [SCRIPT]}
    reply = {"actions": [[0.5]], "confidence": [[None]], "names": [f"{SCRIPT}.{SCRIPT}"], "execute": 1, "control_hz": 1,
             "hold": True, "reason": SCRIPT, "needs_help": SCRIPT, "policy": SCRIPT, "batch": 1,
             "timing": {"infer": 1, "wait": 1, "serve": 1}}  # fmt: skip
    error = dict.fromkeys(("code", "where", "found", "expected", "fix"), SCRIPT)
    answers = [(200, reply), (422, {"error": error}), (502, SCRIPT)]

    def prepare(page: Page) -> None:
        page.route("**/v1/info", lambda route: route.fulfill(json=info))
        page.route("**/v1/act", lambda route: route.fulfill(**answer()))

    def answer() -> dict[str, Any]:
        status, said = answers.pop(0)
        return {"status": status, "body": said if isinstance(said, str) else json.dumps(said)}

    page = visit(two_cameras, but="status of (422|502) ", prepare=prepare)
    expect(page.locator("#name")).to_have_text(SCRIPT)
    said = re.escape(SCRIPT)
    for place, count in (("#held", 2), ("#refused", 5), ("#refused", 1)):
        page.get_by_role("button", name="Act").click()
        # Waited for, not looked at once: what the answer before it said stands until this one comes.
        often = re.compile(f"^(?:(?!{said}).)*(?:{said}(?:(?!{said}).)*){{{count}}}$", re.DOTALL)
        expect(page.locator(place)).to_have_text(often)
    assert page.locator("script").count() == 1 and page.locator("img").count() == 1


FOCUSED = """() => {
  const node = document.activeElement, drawn = node.type === "file" ? node.nextSibling : node;
  const name = node.labels?.[0]?.innerText ?? node.getAttribute("aria-label") ?? node.nextSibling?.innerText ?? node.innerText;
  return [name, getComputedStyle(drawn).outlineStyle !== "none"]; }"""
"""(name of what has the focus, whether one sees that it has)."""


def test_the_keyboard_is_enough(two_cameras: str, files: dict[str, Path], visit: Visit):
    page = visit(two_cameras)
    # Listened for from the start: `expect_file_chooser` begins to listen as the key goes down, which Chromium may see first.
    page.on("filechooser", lambda chooser: chooser.set_files(files["front.png"]))
    expect(page.get_by_label("front", exact=True)).to_be_attached()
    walked: list[str] = []

    def tab() -> str:
        page.keyboard.press("Tab")
        name, seen = page.evaluate(FOCUSED)
        assert seen, f"nobody sees that the focus is on {name}"
        walked.append(re.split(r"\n", name.strip())[0])
        return walked[-1]

    assert [tab() for _ in range(3)] == ["Skip to the answer", "Robot", "front"]
    page.keyboard.press("Enter")
    expect(page.locator("#news")).to_contain_text("front: front.png")
    assert [tab(), tab()] == ["Remove the picture of front", "wrist"]
    page.keyboard.press("Space")
    expect(page.locator("#news")).to_contain_text("wrist: front.png")
    assert [tab(), tab()] == ["Remove the picture of wrist", "Instruction"]
    page.keyboard.type("lift the green cube")
    page.keyboard.press("Enter")
    expect(page.locator("#said")).to_contain_text("Confidence 100.0 %")
    assert page.locator("#said").get_attribute("role") == "status"
    assert [tab() for _ in range(5)] == ["Act", "eef.x", "eef.y", "eef.z", "gripper.opening"]
    assert [tab() for _ in range(2)] == ["Scale to the values", "Actions over time; arrow keys choose a step"]
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#readout")).to_have_text(re.compile(r"^step 1, 0\.1 s: eef\.dx 0 \(100\.0 %\), eef\.dy"))
    assert [tab() for _ in range(2)] == ["Confidence", "All actions as numbers"]
    page.keyboard.press("Enter")
    expect(page.locator("#numbers table")).to_be_visible()


def test_a_hold_says_why_on_a_narrow_dark_screen(files: dict[str, Path], visit: Visit, tmp_path: Path):
    """An arm that is told joint targets, seen far from where the policy wants it: fourteen dimensions, and no motion."""
    guard = tmp_path / "guard.yaml"
    jump = {"left_arm": 0.1, "left_gripper": 0.5, "right_arm": 0.1, "right_gripper": 0.5}
    guard.write_text(json.dumps({"aloha": {"jump": jump, "most_holds": 1}}))
    with serving("null:aloha", "--guard", str(guard), *PATIENT) as address:
        page = visit(address, viewport={"width": 360, "height": 740}, color_scheme="dark")
        give(page, "front", files["other.jpg"])
        page.get_by_label("Instruction").fill("hand it over")
        page.get_by_label("left_arm.waist").fill("3")
        page.keyboard.press("Enter")
        held = page.locator("#held")
        expect(held).to_contain_text("Hold: what the policy said was not passed on")
        expect(held).to_contain_text("left_arm.waist")
        expect(held).to_contain_text("Needs help")
        expect(held).to_contain_text("held 1 times in 1 chunks")
        expect(page.locator("#said")).to_be_in_viewport()  # though the form alone is higher than this screen
        expect(page.locator("#lines figure")).to_have_count(14)
        assert page.evaluate("document.scrollingElement.scrollWidth") == 360
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"


def test_a_server_that_is_not_ready_is_waited_for(two_cameras: str, visit: Visit):
    loading = {"error": {"code": "unavailable", "where": "server", "found": "the policy is loading", "expected": "a policy",
                         "fix": "try again later", "retry_after": 1.0}}  # fmt: skip

    def prepare(page: Page) -> None:
        page.route("**/v1/info", lambda route: route.fulfill(status=503, json=loading), times=1)

    page = visit(two_cameras, but="status of 503 ", prepare=prepare)
    expect(page.locator("#about")).to_contain_text("the policy is loading")
    expect(page.locator("#name")).to_have_text("null:tabletop_wrist")


def test_a_browser_is_asked_for_the_token_and_keeps_it(files: dict[str, Path], visit: Visit, browser: Browser, tmp_path: Path):
    tokens = tmp_path / "tokens"
    tokens.write_text(TOKEN)
    with started("null:tabletop", "--token-file", tokens, *PATIENT, token=TOKEN) as server:
        address = server.address
        page = visit(address, but="status of 401 ", http_credentials={"username": "anybody", "password": TOKEN})
        give(page, "front", files["front.png"])
        page.get_by_label("Instruction").fill("touch the red cube")
        page.get_by_role("button", name="Act").click()
        expect(page.locator("#chunk")).to_be_visible()
        for path in FILES:
            assert fetch(address + path)[0] == 401
        context = browser.new_context(http_credentials={"username": "anybody", "password": "another-token-of-them"})
        refused = context.new_page().goto(address)
        assert refused is not None and refused.status == 401 and "unauthorized" in refused.text()
        context.close()
