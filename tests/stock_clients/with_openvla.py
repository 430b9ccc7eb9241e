"""json-numpy and requests drive, as the clients of OpenVLA (`deploy.py`) and OpenVLA-OFT (`get_action_from_server`) do."""

from __future__ import annotations

from typing import Any

import json_numpy  # pyright: ignore[reportMissingImports]
import requests
import robot

json_numpy.patch()
SETTINGS = robot.SETTINGS


def plain(look: dict[str, Any]) -> list[Any]:
    """One action a look."""
    return [_post({"image": look["images"]["front"], **_words(look)}).json()]


def encoded(look: dict[str, Any]) -> list[Any]:
    """The same as text within the text, both ways."""
    payload = {"image": look["images"]["front"], **_words(look)}
    return [json_numpy.loads(_post({"encoded": json_numpy.dumps(payload)}).json())]


def oft(look: dict[str, Any]) -> list[Any]:
    """A chunk a look."""
    words = {name: value for name, value in _words(look).items() if name != "unnorm_key"}
    return _post({"full_image": look["images"]["front"], **words}).json()


def _words(look: dict[str, Any]) -> dict[str, Any]:
    words = {"instruction": look["instruction"], "unnorm_key": SETTINGS["robot"]}
    return words | ({"state": look["state"]} if SETTINGS["state"] else {})


def _post(payload: dict[str, Any]) -> requests.Response:
    robot.tell(sent=json_numpy.dumps(payload).encode())
    return requests.post(SETTINGS["url"], json=payload)


def main() -> None:
    if wrong := SETTINGS.get("wrong"):
        response = requests.post(SETTINGS["url"], json=wrong)
        robot.tell(status=response.status_code, body=response.json())
        return
    ask = {"plain": plain, "encoded": encoded, "oft": oft}[SETTINGS["payload"]]
    for _ in range(SETTINGS["episodes"]):
        look = robot.reset()
        while not look["over"]:
            chunk = ask(look)
            robot.tell(steps=len(chunk))
            for action in chunk[: SETTINGS["horizon"]]:
                look = robot.act(action[SETTINGS["dims"]] if "dims" in SETTINGS else action)
                if look["over"]:
                    break


main()
