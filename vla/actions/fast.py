"""FAST (Pertsch et al. 2025): a chunk's cosine transform, rounded, as text, said in byte-pair tokens.

    unit (H, a) -> DCT-II over time, orthonormal -> round(scale * c) - min_token -> one character each, lowest frequency of
    all dimensions first -> BPE -> n symbols

Fitted on a user's own data (`FastCodec.fit`), or read from a folder in the published layout (`FastCodec.from_folder`), whose
Python file is never run. The published decoder returns a chunk of zeros when what a model said is no chunk; here decoding is
constrained instead (`_Speech`): every symbol must leave a rest that can be said with the symbols that are left, so what is
said is always H * a characters. Published tokenizers work on bytes, and most of their symbols are not whole characters; the
constraint knows UTF-8.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from vla.actions.codec import check_chunk, check_chunks, check_unit
from vla.errors import CheckpointError, DataError, UsageError

_NEVER = 2**30  # symbols to say something that cannot be said
_MOST = 2**16  # symbols of a chunk that a file may ask for: room for them is made before any is said
_SURROGATES = 0xD800  # characters from here on are none by themselves


def dct_matrix(steps: int) -> np.ndarray:
    """(H, H) orthonormal DCT-II: `D @ x` are the coefficients of x (H, ...), `D.T @ c` the way back."""
    k, n = np.arange(steps)[:, None], np.arange(steps)[None]
    matrix = np.sqrt(2.0 / steps) * np.cos(np.pi * (2 * n + 1) * k / (2 * steps))
    matrix[0] /= np.sqrt(2.0)
    return matrix


class FastCodec:
    """K = the tokenizer's vocabulary; N = `most`, the symbols a chunk may take at most.

    A chunk that would take more is said without its highest frequencies, as many as needed; `fit` sets `most` to the longest
    it saw. Within `most`, no number is off by more than `max_error`.

    A published alphabet holds the coefficients its makers saw. Others become the nearest that it holds, `max_error` says what
    that may cost, and where it may cost half a number's range or more, `CheckpointError` is raised.
    """

    centres = None

    def __init__(
        self, tokenizer: str, chunk: int, most: int, scale: float = 10.0, min_token: int = 0, fitted: Mapping | None = None
    ) -> None:
        """`tokenizer` is the content of a tokenizer.json."""
        if chunk < 1 or not _whole(most) or not 1 <= most <= _MOST:
            raise ValueError(f"FastCodec(chunk={chunk}, most={most}): chunk >= 1, most a whole number in 1..{_MOST}")
        # No motion, coefficient 0, must be among them; and where all coefficients round to it, nothing else is.
        sound = _whole(min_token) and min_token <= 0 and _number(scale)
        if not sound or not 1 <= math.sqrt(chunk) * scale <= _SURROGATES - 1 + min_token:
            raise _misfit(chunk, scale, min_token, f"scale {scale!r}, min_token {min_token!r}")
        self.chunk, self.most, self.scale, self.min_token = chunk, most, float(scale), min_token
        self.fitted = {**(fitted or {}), "chunk": chunk}
        self._text = tokenizer
        self._dct = dct_matrix(chunk)
        # Every coefficient of numbers in [-1, 1] is at most sqrt(H): no character beyond that one is ever needed.
        self._last = max(0, math.ceil(math.sqrt(chunk) * self.scale) - min_token)
        self._tokenizer = Tokenizer.from_str(tokenizer)
        self._bytes = _bytes_of(self._tokenizer, json.loads(tokenizer))
        self.size = len(self._bytes)
        self._nearest = self._sayable()
        self._next, self._count = _transitions(self._bytes, self._last)
        self._least = np.zeros((len(self._next), 1), np.int64)
        self._missing = self._unsaid()
        if self._missing >= 1:
            raise _misfit(chunk, scale, min_token, f"scale {scale!r}, min_token {min_token!r} and an alphabet of "
                          f"{len(np.unique(self._nearest))}, with which a number may be off by {self._missing:.2g}")  # fmt: skip

    def __reduce__(self):  # loader workers are given the codec
        return FastCodec, (self._text, self.chunk, self.most, self.scale, self.min_token, self.fitted)

    @property
    def max_error(self) -> float:
        """Largest |decode(encode(a)) - a| of a chunk that `most` symbols can say: half a coefficient's step in each of H, and
        what coefficients that the alphabet lacks may add."""
        return min(2.0, 0.5 * math.sqrt(self.chunk) / self.scale + self._missing)

    # ------------------------------------------------------------------------------------------------ chunk <-> symbols

    def encode(self, unit: np.ndarray) -> np.ndarray:
        """(H, a) -> (n,) int64, n <= `most`. Values outside [-1, 1] are clipped. Raises `DataError` on a non-finite value and
        `UsageError` for another number of steps."""
        unit = check_unit(unit)
        check_chunk("fast", self.chunk, len(unit))
        rounded = np.around(self._dct @ unit * self.scale).astype(np.int64)
        for kept in range(self.chunk, -1, -1):
            rounded[kept:] = 0
            symbols = self._tokenizer.encode(self._characters(rounded), add_special_tokens=False).ids
            if len(symbols) <= self.most:
                return np.array(symbols, np.int64)
        raise DataError("action chunk", found=f"{len(symbols)} symbols for no motion at all", expected=f"at most {self.most}",
                        fix="fit the tokenizer with this robot's data, or with more --tokens")  # fmt: skip

    def decode(self, symbols: np.ndarray, dims: int) -> np.ndarray:
        """(n,) -> (H, dims) float32, clipped to [-1, 1]; symbols after a whole chunk are not read.

        Raises `DataError` when they are no whole chunk; what `speech` allowed always is one.
        """
        wanted = self.chunk * dims
        owner, text = self._read(symbols, dims)
        if len(owner) != wanted:
            raise DataError("action symbols", found=f"{len(owner)} coefficients", expected=f"{wanted} = {self.chunk} x {dims}",
                            fix="say them through `speech`, which allows nothing else")  # fmt: skip
        coefficients = np.array([ord(c) for c in text], np.float64).reshape(self.chunk, dims) + self.min_token
        return np.clip(self._dct.T @ (coefficients / self.scale), -1.0, 1.0).astype(np.float32)

    def expected(self, p: np.ndarray, dims: int) -> None:
        """None: where a symbol stands depends on what was said before, so there is no expectation symbol by symbol."""
        return None

    def spread(self, values: np.ndarray, symbols: np.ndarray, dims: int) -> np.ndarray:
        """(n,) -> (H, dims): the mean over the dimension's H coefficients, each valued as the symbol that completed it. A
        coefficient moves all steps, so all steps of a dimension share one value."""
        owner, _ = self._read(symbols, dims)
        means = np.asarray(values)[owner].reshape(self.chunk, dims).mean(0)
        return np.repeat(means[None], self.chunk, axis=0)

    def slots(self, steps: int, room: int, widths: Sequence[int]) -> int:
        """`most`; raises `UsageError` for other chunks, and for robots too wide to be said with so few."""
        check_chunk("fast", self.chunk, steps)
        for dims in widths:
            if (least := int(self._fewest(steps * dims)[0, steps * dims])) > self.most:
                raise UsageError("policy.codec (fast)", found=f"a robot of {dims} dimensions",
                                 expected=f"one that {self.most} symbols can say; it takes {least} or more",
                                 fix="fit the tokenizer with this robot's data too, or with more --tokens")  # fmt: skip
        return self.most

    def speech(self, dims: np.ndarray) -> _Speech:
        """Begin to say B chunks of robots of `dims` (B,) dimensions."""
        return _Speech(self, np.asarray(dims, np.int64))

    # ------------------------------------------------------------------------------------------------ making one

    @classmethod
    def fit(
        cls, chunks: Sequence[np.ndarray], *, scale: float = 10.0, vocabulary: int = 1024, most: int | None = None,
        fitted: Mapping | None = None, progress: bool = False,
    ) -> FastCodec:  # fmt: skip
        """From chunks (H, a) in [-1, 1] of one H and any a. `most` defaults to what the longest of these chunks,
        and no motion, take.

        Unlike the published fit, the alphabet holds every coefficient that numbers in [-1, 1] can have, not those that were
        seen, and BPE works on characters: bytes would cost two symbols for a rare coefficient beyond 127.
        Raises `UsageError` when the vocabulary is smaller than the alphabet, or no alphabet is of that scale.
        """
        steps = check_chunks(chunks)
        highest = (_SURROGATES - 1) // 2 / math.sqrt(steps)
        if not _number(scale) or not 1 / math.sqrt(steps) <= scale <= highest:
            raise UsageError("--scale", found=scale, expected=f"{1 / math.sqrt(steps):.3g} to {int(highest)} for {steps} steps",
                             fix="--scale 10")  # fmt: skip
        largest = math.ceil(math.sqrt(steps) * scale)
        alphabet = [chr(i) for i in range(2 * largest + 1)]
        if len(alphabet) > vocabulary:
            raise UsageError("--vocabulary", found=vocabulary, expected=f"{len(alphabet)} or more at scale {scale}",
                             fix=f"--vocabulary {2 * len(alphabet)}, or a lower --scale")  # fmt: skip
        matrix = dct_matrix(steps)
        texts = ("".join(map(chr, np.around(matrix @ check_unit(c) * scale).astype(int).reshape(-1) + largest)) for c in chunks)
        tokenizer = Tokenizer(BPE())
        tokenizer.decoder = Fuse()  # pyright: ignore[reportAttributeAccessIssue]
        trainer = BpeTrainer(vocab_size=vocabulary, min_frequency=2, show_progress=progress, special_tokens=[],
                             initial_alphabet=alphabet, max_token_length=10_000)  # fmt: skip
        tokenizer.train_from_iterator(texts, trainer=trainer, length=len(chunks))
        return cls(tokenizer.to_str(), steps, 1, scale, -largest, fitted).with_most(chunks, most)

    @classmethod
    def from_folder(cls, folder: str | Path, chunk: int, dims: int, fitted: Mapping | None = None) -> FastCodec:
        """The published layout (physical-intelligence/fast): tokenizer.json, and processor_config.json with `scale`,
        `min_token`, `time_horizon`, `action_dim`; nothing else in the folder is read. `most` is what any robot of up to
        `dims` dimensions can need; `with_most` measures less. Raises `CheckpointError` when it is missing or does not fit.
        """
        folder = Path(folder)
        try:
            config = json.loads((folder / "processor_config.json").read_text())
            text = (folder / "tokenizer.json").read_text()
            scale, min_token = config["scale"], config["min_token"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:  # RecursionError: nested too deep
            raise CheckpointError(folder, found=f"{type(error).__name__}: {error}",
                                  expected="tokenizer.json, and processor_config.json with scale and min_token",
                                  fix="download all files of the tokenizer again") from error  # fmt: skip
        for name, ours in (("time_horizon", chunk), ("action_dim", dims)):
            if config.get(name) not in (None, ours):
                raise CheckpointError(folder / "processor_config.json",
                                      found=f"{name} {config[name]}", expected=f"{ours} or null",
                                      fix="use a tokenizer fitted for these chunks, or fit one: vla data tokenizer")  # fmt: skip
        try:
            codec = cls(text, chunk, 1, scale, min_token, fitted)
        except CheckpointError as error:
            raise CheckpointError(folder / "processor_config.json", found=error.found, expected=error.expected,
                                  fix=error.fix) from None  # fmt: skip
        except Exception as error:  # `tokenizers` raises bare Exceptions
            raise CheckpointError(folder / "tokenizer.json", found=f"{type(error).__name__}: {error}",
                                  expected="a byte-pair tokenizer", fix="download it again") from error  # fmt: skip
        codec.most = chunk * dims * len(chr(codec._last).encode())
        return codec

    def with_most(self, chunks: Iterable[np.ndarray], most: int | None = None) -> FastCodec:
        """The same with N = `most`, or the most symbols one of `chunks`, or no motion of their widths, takes. Raises
        `UsageError` when a given `most` is too few."""
        self.most, longest, widths = _NEVER, 1, set()
        for chunk in chunks:
            widths.add(chunk.shape[1])
            longest = max(longest, len(self.encode(chunk)) if most is None else 0)
        # No motion must be sayable, or nothing is: `encode` falls back to it.
        least = max((len(self.encode(np.zeros((self.chunk, dims)))) for dims in widths), default=1)
        if most is not None and most < least:
            raise UsageError("--tokens", found=most, expected=f"{least} or more", fix=f"--tokens {least}, or leave it out")
        self.most = max(longest, least) if most is None else most
        return self

    def to_json(self) -> dict:
        return {"kind": "fast", "chunk": self.chunk, "tokens": self.most, "scale": self.scale, "min_token": self.min_token,
                "fitted": self.fitted, "tokenizer": self._text}  # fmt: skip

    @classmethod
    def from_json(cls, entry: Mapping) -> FastCodec:
        return cls(entry["tokenizer"], entry["chunk"], entry["tokens"], entry["scale"], entry["min_token"], entry["fitted"])

    # ------------------------------------------------------------------------------------------------ characters

    def _characters(self, rounded: np.ndarray) -> str:
        """Coefficients as text; one that the tokenizer has no symbols for becomes its nearest that it has."""
        return "".join(map(chr, self._nearest[np.clip(rounded.reshape(-1) - self.min_token, 0, self._last)]))

    def _sayable(self) -> np.ndarray:
        """(last + 1,): for each character, the nearest one that survives the tokenizer."""
        known = [c for c in range(self._last + 1)
                 if b"".join(self._bytes[i] for i in self._tokenizer.encode(chr(c), add_special_tokens=False).ids)
                 == chr(c).encode()]  # fmt: skip
        if not known:
            raise ValueError(f"no character of 0..{self._last} survives the tokenizer")
        every, near = np.arange(self._last + 1), np.array(known)
        above = np.searchsorted(near, every)
        low, high = near[np.maximum(above - 1, 0)], near[np.minimum(above, len(near) - 1)]
        return np.where(every - low <= high - every, low, high)

    def _unsaid(self) -> float:
        """How far a number may be off because coefficients became others: 0 where the alphabet holds all.

        A step's error is at most sqrt(2 / H) times the sum of its coefficients' misses. That a chunk has few large ones bounds
        this sum: their squares add up to (sqrt(H) * scale)^2 at most, here with what rounding adds. For any price per square,
        H * max(miss - price * c^2) + price * squares is no less than the sum; the best of some prices is taken.
        """
        root = math.sqrt(self.chunk)
        c = np.arange(-math.ceil(root * self.scale), math.ceil(root * self.scale) + 1)
        miss = np.abs(self._nearest[np.clip(c - self.min_token, 0, self._last)] + self.min_token - c).astype(np.float64)
        if not miss.any():
            return 0.0
        prices = [0.0, (miss / np.maximum(c * c, 1)).max(), *np.geomspace(1e-6, 1.0, 61)]
        squares = (root * self.scale + 0.5 * root) ** 2
        total = min(self.chunk * (miss - price * c * c).max() + price * squares for price in prices)
        return float(math.sqrt(2 / self.chunk) * total / self.scale)

    def _read(self, symbols: np.ndarray, dims: int) -> tuple[np.ndarray, str]:
        """(which symbol completed each character, the characters), up to a whole chunk or where the text breaks."""
        state, owner, data = 0, [], b""
        for i, symbol in enumerate(np.asarray(symbols).tolist()):
            if len(owner) >= self.chunk * dims or not 0 <= symbol < self.size or self._next[state, symbol] < 0:
                break
            owner += [i] * int(self._count[state, symbol])
            state, data = int(self._next[state, symbol]), data + self._bytes[symbol]
        return np.array(owner, np.int64), data.decode(errors="ignore")

    def _fewest(self, most: int) -> np.ndarray:
        """(states, > most): the fewest symbols that say r more characters from a state, with nothing left over."""
        if self._least.shape[1] <= most:
            least = np.full((len(self._next), most + 1), _NEVER, np.int64)
            least[0, 0] = 0
            for r in range(most + 1):
                # Steps without a whole character only ever shorten what is pending, at most three bytes.
                for _ in range(4 if r else 1):
                    for state, then, count in self._steps:
                        if count <= r:
                            least[state, r] = min(least[state, r], 1 + least[then, r - count])
            self._least = least
        return self._least

    @cached_property
    def _steps(self) -> list[tuple[int, int, int]]:
        """Every different (state, next state, whole characters) some symbol makes."""
        found = {(s, int(then), int(count)) for s in range(len(self._next))
                 for then, count in zip(self._next[s], self._count[s], strict=True) if then >= 0}  # fmt: skip
        return sorted(found)


class _Speech:
    """See `vla.actions.codec.Speech`: a row's state is the bytes of a begun character, how many characters are still to be
    said, and with how many symbols."""

    def __init__(self, codec: FastCodec, dims: np.ndarray) -> None:
        self.codec, self.state = codec, np.zeros(len(dims), np.int64)
        self.characters, self.symbols = codec.chunk * dims, np.full(len(dims), codec.most, np.int64)
        self.least = codec._fewest(int(self.characters.max(initial=0)))

    @property
    def done(self) -> np.ndarray:
        return self.characters == 0

    def allowed(self) -> np.ndarray:
        then, rest = self.codec._next[self.state], self.characters[:, None] - self.codec._count[self.state]
        fits = (then >= 0) & (rest >= 0)
        return fits & (self.least[np.where(fits, then, 0), np.where(fits, rest, 0)] < self.symbols[:, None])

    def say(self, symbols: np.ndarray) -> None:
        going = ~self.done
        then, count = self.codec._next[self.state, symbols], self.codec._count[self.state, symbols]
        assert (then[going] >= 0).all()
        self.state = np.where(going, then, self.state)
        self.characters = self.characters - np.where(going, count, 0)
        self.symbols = self.symbols - going


def _whole(number: object) -> bool:
    """Whether it is a whole number; JSON's true and 1.0 are none."""
    return isinstance(number, int) and not isinstance(number, bool)


def _number(number: object) -> bool:
    """Whether it is a finite number; JSON's true is none."""
    return isinstance(number, int | float) and not isinstance(number, bool) and abs(number) < 1e300


def _misfit(chunk: int, scale: float, min_token: int, found: str) -> CheckpointError:
    lowest = f", min_token about {-math.ceil(math.sqrt(chunk) * scale)}" if _number(scale) and 0 < scale < 1e9 else ""
    return CheckpointError("a FAST tokenizer's scale and min_token", found=found,
                           expected=f"a whole min_token and a scale that say the coefficients of {chunk} steps in [-1, 1]: "
                           f"scale {1 / math.sqrt(chunk):.2g} or more{lowest} or less, and an alphabet that reaches as far up",
                           fix="take tokenizer.json and processor_config.json of one fit, or fit one: vla data tokenizer",
                           )  # fmt: skip


def _bytes_of(tokenizer: Tokenizer, content: dict) -> list[bytes]:
    """(K,) the bytes each symbol stands for; empty where there is none. K is one more than the largest id."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    byte_level = "ByteLevel" in json.dumps(content.get("decoder"))
    table = _byte_level_alphabet() if byte_level else {}
    out = [b""] * (max(vocabulary.values()) + 1)
    for token, i in vocabulary.items():
        # As the decoder does: a token with a character outside the byte alphabet stands for itself.
        known = byte_level and all(c in table for c in token)
        out[i] = bytes(table[c] for c in token) if known else token.encode()
    return out


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: printable Latin-1 stands for itself, the rest follows from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _transitions(symbols: list[bytes], last: int) -> tuple[np.ndarray, np.ndarray]:
    """(states, K) the state a symbol leads to, -1 where it breaks the text, and the whole characters it completes.

    A state is the bytes of a character that has begun; state 0 is none. Characters beyond `last` break the text too: no chunk
    in [-1, 1] has such a coefficient.
    """
    states, then, counts = [b""], [], []
    while len(then) < len(states):
        before = states[len(then)]
        row, count = np.full(len(symbols), -1, np.int64), np.zeros(len(symbols), np.int64)
        for i, symbol in enumerate(symbols):
            if (got := _advance(before + symbol, last)) is not None and symbol:
                text, rest = got
                if rest not in states:
                    states.append(rest)
                row[i], count[i] = states.index(rest), len(text)
        then.append(row)
        counts.append(count)
    return np.stack(then), np.stack(counts)


def _advance(data: bytes, last: int) -> tuple[str, bytes] | None:
    """(whole characters, begun one) of UTF-8 `data`; None where it is none, or has characters beyond `last`."""
    try:
        text, rest = data.decode(), b""
    except UnicodeDecodeError as error:
        if error.reason != "unexpected end of data":
            return None
        text, rest = data[: error.start].decode(), data[error.start :]
    return None if any(ord(c) > last for c in text) or (rest and _smallest(rest[0]) > last) else (text, rest)


def _smallest(lead: int) -> int:
    """No character that begins with this byte of UTF-8 is smaller; most published symbols need not be followed further."""
    if lead < 0xE0:
        return (lead & 0x1F) << 6
    return max(0x800, (lead & 0x0F) << 12) if lead < 0xF0 else 0x10000
