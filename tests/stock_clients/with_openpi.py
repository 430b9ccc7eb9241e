"""openpi-client drives: its `Runtime`, `PolicyAgent`, `ActionChunkBroker` and `WebsocketClientPolicy`, all as published."""

from __future__ import annotations

import robot
from openpi_client.action_chunk_broker import ActionChunkBroker  # pyright: ignore[reportMissingImports]
from openpi_client.base_policy import BasePolicy  # pyright: ignore[reportMissingImports]
from openpi_client.msgpack_numpy import packb  # pyright: ignore[reportMissingImports]
from openpi_client.runtime.agents.policy_agent import PolicyAgent  # pyright: ignore[reportMissingImports]
from openpi_client.runtime.environment import Environment  # pyright: ignore[reportMissingImports]
from openpi_client.runtime.runtime import Runtime  # pyright: ignore[reportMissingImports]
from openpi_client.websocket_client_policy import WebsocketClientPolicy  # pyright: ignore[reportMissingImports]


class Table(Environment):
    """The robot as openpi's examples have theirs."""

    def reset(self) -> None:
        self.look = robot.reset()

    def is_episode_complete(self) -> bool:
        return self.look["over"]

    def get_observation(self) -> dict:
        look = self.look
        return {
            "observation/image": look["images"]["front"], "observation/state": look["state"], "prompt": look["instruction"],
        }  # fmt: skip

    def apply_action(self, action: dict) -> None:
        self.look = robot.act(action["actions"])


class Overheard(BasePolicy):
    """The published policy; the test is told what it sends, by its own packer, and what it gets."""

    def __init__(self, policy: WebsocketClientPolicy) -> None:
        self.policy = policy

    def infer(self, obs: dict) -> dict:
        robot.tell(sent=packb(obs))
        result = self.policy.infer(obs)
        robot.tell(chunk=result["actions"], timing=result["server_timing"], hold=result["hold"])
        return result

    def reset(self) -> None:
        self.policy.reset()


def main() -> None:
    settings = robot.SETTINGS
    try:
        policy = WebsocketClientPolicy(**settings["policy"])
    except Exception as error:
        robot.tell(refused=f"{type(error).__name__}: {error}")
        return
    robot.tell(metadata=policy.get_server_metadata())
    if settings.get("wrong"):
        look = robot.reset()
        try:
            policy.infer({"observation/image": look["images"]["front"], "prompt": look["instruction"]})  # and no state
        except RuntimeError as error:
            robot.tell(error=str(error))
        return
    table = Table()
    agent = PolicyAgent(ActionChunkBroker(Overheard(policy), settings["horizon"]))
    Runtime(table, agent, subscribers=[], num_episodes=settings["episodes"]).run()


main()
