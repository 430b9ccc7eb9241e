"""Action codecs: a chunk of actions in [-1, 1] <-> a sequence of symbols 0..K-1. A codec knows no tokenizer."""

from vla.actions.bins import BinCodec
from vla.actions.codec import ActionCodec, codec_from_json

__all__ = ["ActionCodec", "BinCodec", "codec_from_json"]
