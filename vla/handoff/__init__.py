"""When to stop and ask: how sure a policy is of itself, look by look, and a threshold that keeps its promise on what goes well.

    vla handoff collect POLICY --suite tabletop --out DIR     # episodes in which something goes wrong, look by look
    vla handoff calibrate POLICY --train DIR --calibrate DIR  # a detector, and a threshold, into the policy's folder
    vla handoff report POLICY --rollouts DIR                  # on further episodes: what it is worth

On the robot (no torch): `gate.py` says fine, ask, hold or retreat after every look; `scores.py`, `detectors.py` and
`conformal.py` are what it knows; `incidents.py` keeps the last seconds and writes what happened around a hand-off as a LeRobot
dataset. Here: `trouble.py` what goes wrong, `play.py` who plays it, `collecting.py` which scenes, `rollouts.py` the tables,
`learning.py` what is fitted to them, `calibrating.py` the thresholds, `measures.py` and `report.py` the figures, `watch.py` an
unattended run with the gate on, `command.py` the verb.
"""
