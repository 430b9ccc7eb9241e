"""A policy for another program or for a robot: `vla export POLICY --to onnx|openvla|policy --out DIR`.

`onnx` and `graphs` write a student as graphs, `int8` in fewer bits, `parity` measures what that costs, `runtime` chooses by
measuring, `folder` publishes, `actor` acts from what was published, `openvla` knows OpenVLA's layout, `command` is the verb.
"""

from vla.export.command import add_export_parser
from vla.export.openvla import export_openvla

__all__ = ["add_export_parser", "export_openvla"]
