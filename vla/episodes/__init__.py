"""Demonstrations as training sees them: any LeRobot v3.0 dataset behind memory-mapped arrays.

`layout.py` reads and judges what lies on disk, `cache.py` decodes it once, `store.py` hands out frames.
"""

from vla.episodes.store import EpisodeStore

__all__ = ["EpisodeStore"]
