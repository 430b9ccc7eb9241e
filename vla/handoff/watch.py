"""`vla handoff watch`: an unattended run with the gate on.

Whoever is asked is the simulator's scripted expert; what happened around every hand-off and every failure becomes a LeRobot
dataset, ready for `vla train`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vla.embodiment import load_embodiment
from vla.evaluate import wilson
from vla.evaluate.jobs import Actor
from vla.evaluate.pool import inference_threads
from vla.handoff.collecting import action_scale, scenes_of, stage_for
from vla.handoff.gate import Gate
from vla.handoff.incidents import POLICY, Recorder
from vla.handoff.play import Live, Scene, looker
from vla.handoff.trouble import check_troubles


def watch(
    policy: Actor, folder: str | Path, suite: str, tasks: Sequence[str] | None, episodes: int, seed: int, *, out: Path,
    perturb: Sequence[str] = ("all",), respond: Mapping[str, float] | None = None, score: str | None = None,
    execute: int | None = None, decode: str | None = None, seconds: float = 5.0, progress: bool = True, sims: str = "vla.sims",
) -> dict[str, Any]:  # fmt: skip
    """Play `episodes` with the gate of the policy `folder`; incidents go to `out`, what the expert did to `out`-corrections.

    After `ask` the expert has an episode's steps of its own; `hold` and `retreat` end an episode here. Returns counts, the
    success with its interval, and what was written. Raises as `collect`, and `CheckpointError` where the policy has no gate.
    """
    stage, room, names, spec = stage_for(policy, suite, tasks, episodes, seed, sims)
    there, size = load_embodiment(room.embodiment), stage.image_size
    gate = Gate.load(folder, respond, score)
    meaning = gate.handoff.meaning
    steps, how = int(execute or meaning["execute"]), str(decode or meaning["decode"])
    scale, kinds = action_scale(policy, spec.key), check_troubles(perturb, suite)
    think = looker(policy, spec.key, how, gate.samples)
    cameras = {name: camera.model_copy(update={"height": size, "width": size}) for name, camera in there.cameras.items()}
    header = {"suite": suite, "policy": policy.fingerprint, "score": gate.score, "respond": dict(gate.respond)}
    ends: Counter[str] = Counter()
    recorder = Recorder(out, there.model_copy(update={"cameras": cameras}), before=seconds, header=header, patient=True,
                        corrections=out.with_name(f"{out.name}-corrections"))  # fmt: skip
    try:
        with recorder, inference_threads(1):
            for scene in tqdm(scenes_of(room, names, kinds, episodes, seed), desc=f"watch {suite}", unit="ep",
                              disable=None if progress else True):  # fmt: skip
                live = Live(scene, stage, scale)
                ends[_attend(live, scene, gate, recorder, think, room.instruction(scene.task), steps)] += 1
                live.close()
    finally:
        stage.close()
    won = ends["succeeded"] + ends["succeeded after help"]
    low, high = wilson(won, episodes)
    return {"out": str(out), "episodes": episodes, "ends": dict(ends.most_common()), "success": round(won / episodes, 4),
            "interval": [round(low, 4), round(high, 4)], "questions": ends["succeeded after help"] + ends["failed after help"],
            "incidents": recorder.written, "corrections": recorder.corrected, "lost": recorder.lost,
            "problem": recorder.problem}  # fmt: skip


def _attend(
    live: Live, scene: Scene, gate: Gate, recorder: Recorder, think: Any, told: str, execute: int
) -> str:  # fmt: skip
    """One episode; how it ended."""
    gate.reset()
    recorder.begin(told, scene.task, scene.seed)
    seen, step, by, most, chunk = live.seen, 0, POLICY, live.sim.max_steps, None
    live.sim.max_steps, limit = 1 << 30, most
    try:
        while step < limit:
            if by == POLICY and step % execute == 0:
                look = think([seen], [told], [scene.seed * 1009 + step])[0]
                chunk, ruling = look.chunk, gate.look(look.chunk, step, look.features, look.samples)
                if ruling.say != "fine":
                    kind = "hold" if ruling.say == "hold" else "handoff"
                    recorder.incident(kind, f"{ruling.say}: {ruling.reason}", scores=dict(ruling.scores), trouble=scene.trouble)
                    if ruling.say != "ask":
                        recorder.end(success=False)
                        return f"stopped ({ruling.say})"
                    by, limit = "expert", step + most
            assert chunk is not None
            action = live.sim.expert() if by != POLICY else chunk.actions[step % execute]
            recorder.tick(seen, action, by, told)
            seen, over, info = live.step(step, action, render=True)
            step += 1
            seen = live.trouble.see(seen, step)
            if over:
                success = bool(info["success"])
                break
        else:
            success = False
        if not success:
            recorder.incident("failure", "out of steps" if step >= limit else "spoilt", trouble=scene.trouble)
        recorder.end(success)
        return ("succeeded" if success else "failed") + (" after help" if by != POLICY else "")
    finally:
        live.sim.max_steps = most
