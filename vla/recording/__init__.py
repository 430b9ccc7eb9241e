"""Writing episodes: LeRobotDataset v3.0, appended to, safe at every moment. No torch here.

    with LeRobotWriter(Path("data/new"), spec) as writer:
        writer.add(episode)  # an Episode, or what `encode_episode` made of one in another process

`writer.py` is the dataset and its commits, `encoded.py` one episode, `video.py` its clips, `columns.py` and
`statistics.py` the numbers, `language.py` what is said while it goes on, `committed.py` continues what was begun.
`vla/episodes/` reads.
"""

from vla.recording.encoded import EncodedEpisode, encode_episode, image_key
from vla.recording.video import VIDEO
from vla.recording.writer import LeRobotWriter, splits

__all__ = ["VIDEO", "EncodedEpisode", "LeRobotWriter", "encode_episode", "image_key", "splits"]
