"""Demonstrations as training sees them: any LeRobot dataset (v2.0, v2.1, v3.0) behind memory-mapped arrays.

`layout.py` (`layout_v2.py` for v2.x) reads and judges what lies on disk, `language.py` the subtasks it names, `cache.py` decodes
it once, `store.py` hands out frames.
What reading looks like, for a dataset that lies here and for one that is streamed, is `Store` (`surface.py`).
"""

from vla.episodes.store import EpisodeStore
from vla.episodes.surface import Store

__all__ = ["EpisodeStore", "Store"]
