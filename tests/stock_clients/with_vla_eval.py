"""vla-eval drives: its `Orchestrator` makes the benchmark below, connects, and plays episodes with its `SyncEpisodeRunner`."""

from __future__ import annotations

from typing import Any

import anyio  # pyright: ignore[reportMissingImports]
import robot
from vla_eval.benchmarks.base import StepBenchmark, StepResult  # pyright: ignore[reportMissingImports]
from vla_eval.connection import Connection  # pyright: ignore[reportMissingImports]
from vla_eval.orchestrator import Orchestrator  # pyright: ignore[reportMissingImports]
from vla_eval.protocol.messages import Message, MessageType, pack_message  # pyright: ignore[reportMissingImports]
from vla_eval.protocol.numpy_codec import set_image_format  # pyright: ignore[reportMissingImports]
from vla_eval.specs import GRIPPER_CLOSE_POS, IMAGE_RGB, LANGUAGE, POSITION_DELTA, RAW  # pyright: ignore[reportMissingImports]

SETTINGS = robot.SETTINGS


class Tabletop(StepBenchmark):
    """The robot as vla-eval's own benchmarks have theirs. `send_state` is for the server to ask for."""

    def __init__(self, send_state: bool = False) -> None:
        super().__init__()
        self.send_state = send_state
        robot.tell(send_state=send_state)

    def get_tasks(self) -> list[dict[str, Any]]:
        return [{"name": f"scene {n}", "suite": "tabletop"} for n in range(SETTINGS["episodes"])]

    def reset(self, task: dict[str, Any]) -> Any:
        return robot.reset()

    def step(self, action: dict[str, Any]) -> StepResult:
        look = robot.act(action["actions"])
        return StepResult(look, float(look["success"]), look["over"], {})

    def make_obs(self, raw_obs: Any, task: dict[str, Any]) -> dict[str, Any]:
        seen = {"images": raw_obs["images"], "task_description": raw_obs["instruction"]}
        if self.send_state:
            seen["state"] = raw_obs["state"]
        robot.tell(sent=pack_message(Message(MessageType.OBSERVATION, seen)))
        return seen

    def get_step_result(self, step_result: StepResult) -> dict[str, Any]:
        return {"success": step_result.obs["success"]}

    def get_action_spec(self) -> dict[str, Any]:
        return {"position": POSITION_DELTA, "gripper": GRIPPER_CLOSE_POS}

    def get_observation_spec(self) -> dict[str, Any]:
        return {"image": IMAGE_RGB, "state": RAW, "language": LANGUAGE}


async def play() -> None:
    """As `vla-eval run` does."""
    config = {"server": {"url": SETTINGS["url"]}, "output_dir": SETTINGS["out"], "benchmarks": [
        {"benchmark": "with_vla_eval:Tabletop", "episodes_per_task": 1, "max_steps": 100},
    ]}  # fmt: skip
    results = await Orchestrator(config, no_save=True).run()
    robot.tell(results=results)


async def err() -> None:
    """An observation without pictures, and then a good one on the same connection."""
    async with Connection(SETTINGS["url"], max_retries=1, backoff_base=0.0) as connection:
        robot.tell(server=connection.server_info)
        look = robot.reset()
        await connection.start_episode({"task": {"name": look["instruction"]}})
        try:
            await connection.act({"images": {}, "state": look["state"]})
        except RuntimeError as error:
            robot.tell(error=str(error))
        reply = await connection.act({"images": look["images"], "state": look["state"]})
        robot.tell(after=reply["actions"])


def main() -> None:
    set_image_format(SETTINGS.get("format", "png"))
    try:
        anyio.run(err if SETTINGS.get("wrong") else play)
    except ConnectionError as error:
        robot.tell(refused=str(error), cause=repr(error.__cause__))


if __name__ == "__main__":
    main()
