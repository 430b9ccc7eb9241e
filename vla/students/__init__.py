"""Small edge policies: a student is a `VLAPolicy` on the backbone `student` (`vla/backbones/student.py`).

    chosen = resolve(StudentChoice(preset="xs"), sizes)     # or StudentChoice(budget={"p95_ms": 15})

`presets` are sizes by name, `choice` what a config says, `budget` a student for a latency on this machine, `exported` the graphs
it is timed by, `depth` the other kind: the teacher itself with fewer layers. The verbs: `command` is `vla students`, `prune` is
`vla prune`.
"""

from vla.students.budget import Budget, fit
from vla.students.choice import Chosen, StudentChoice, resolve
from vla.students.depth import prune_depth
from vla.students.presets import LIMITS, PRESETS, cost, parameters, preset

__all__ = ["LIMITS", "PRESETS", "Budget", "Chosen", "StudentChoice", "cost", "fit", "parameters", "preset", "prune_depth",
           "resolve"]  # fmt: skip
