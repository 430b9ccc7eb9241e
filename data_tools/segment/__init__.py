"""`vla data segment`: recorded episodes cut into subtasks, written as LeRobot language columns into a new dataset.

Subtasks that a dataset names itself (its language column, or an instruction that changes inside an episode) are kept; of other
episodes the hand's motion is judged. `rule.py` says where one subtask ends, `copying.py` writes the copy, `command.py` is the
verb.
"""

from data_tools.segment.command import add_segment_parser, segment

__all__ = ["add_segment_parser", "segment"]
