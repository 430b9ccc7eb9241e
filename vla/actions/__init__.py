"""Action codecs: a chunk of actions in [-1, 1] <-> a sequence of symbols 0..K-1. A codec knows no model's vocabulary."""

from vla.actions.bins import BinCodec
from vla.actions.codec import ActionCodec, SequenceCodec, codec_from_json, hold, is_sequence, read_codec
from vla.actions.fast import FastCodec
from vla.actions.vq import VQCodec

__all__ = [
    "ActionCodec", "BinCodec", "FastCodec", "SequenceCodec", "VQCodec", "codec_from_json", "hold", "is_sequence", "read_codec",
]  # fmt: skip
