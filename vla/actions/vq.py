"""Residual vector quantisation: a chunk as R codes, each the nearest correction to what those before left over.

The idea of VQ-BeT (Lee et al. 2024) and MiniVLA, whose codes come from a learned encoder; here a code is a whole chunk, and the
codebooks are fitted by k-means, round after round. Every sequence of codes is a chunk, so nothing has to be forbidden; and a
chunk is a *sum*, so the expectation of a parallel decoder's R independent guesses is exact. numpy only.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence

import numpy as np
from tqdm import tqdm

from vla.actions.codec import check_chunk, check_chunks, check_unit
from vla.errors import DataError, UsageError


class VQCodec:
    """N = R rounds of K codes. Robots of one width share codebooks; each width has its own."""

    centres = None

    def __init__(self, books: Mapping[int, np.ndarray], chunk: int, fitted: Mapping | None = None) -> None:
        """`books`: width a -> (R, K, H * a) float32, H = `chunk`; R and K are the same for all widths."""
        shapes = {book.shape[:2] for book in books.values()}
        if len(shapes) != 1 or any(book.shape[2] != chunk * a for a, book in books.items()):
            raise ValueError(f"codebooks {({a: b.shape for a, b in books.items()})} for chunks of {chunk} steps")
        if not all(np.isfinite(book).all() for book in books.values()):
            raise ValueError("codebooks with a non-finite number")
        self.books = {a: np.asarray(book, np.float32) for a, book in books.items()}
        self.chunk, self.fitted = chunk, {**(fitted or {}), "chunk": chunk}
        self.rounds, self.size = next(iter(shapes))

    def encode(self, unit: np.ndarray) -> np.ndarray:
        """(H, a) -> (R,) int64. Values outside [-1, 1] are clipped. Raises `DataError` on a non-finite value, `UsageError` for
        a shape it was not fitted for."""
        unit = check_unit(unit)
        check_chunk("vq", self.chunk, len(unit))
        book, rest = self._book(unit.shape[1]), unit.reshape(-1)
        symbols = np.zeros(self.rounds, np.int64)
        for r in range(self.rounds):
            symbols[r] = np.square(book[r] - rest).sum(1).argmin()
            rest = rest - book[r, symbols[r]]
        return symbols

    def decode(self, symbols: np.ndarray, dims: int) -> np.ndarray:
        """(R,) -> (H, dims) float32, clipped to [-1, 1]; for any symbols in [0, K). Raises `DataError` for others."""
        symbols = np.asarray(symbols)
        if symbols.shape != (self.rounds,) or symbols.min() < 0 or symbols.max() >= self.size:
            raise DataError("action symbols", found=symbols.tolist(), expected=f"{self.rounds} numbers in 0..{self.size - 1}",
                            fix="say them through `speech`, which allows nothing else")  # fmt: skip
        total = self._book(dims)[np.arange(self.rounds), symbols].sum(0)
        return np.clip(total, -1.0, 1.0).reshape(self.chunk, dims)

    def expected(self, p: np.ndarray, dims: int) -> np.ndarray:
        """(R, K) -> (H, dims): the expectation, since a chunk is the sum of its codes."""
        total = np.einsum("rk,rkd->d", np.asarray(p, np.float32), self._book(dims))
        return np.clip(total, -1.0, 1.0).reshape(self.chunk, dims)

    def spread(self, values: np.ndarray, symbols: np.ndarray, dims: int) -> np.ndarray:
        """(R,) -> (H, dims): the mean everywhere, for every code moves every number."""
        return np.full((self.chunk, dims), np.mean(values))

    def slots(self, steps: int, room: int, widths: Sequence[int]) -> int:
        """R; raises `UsageError` for chunks and robots it was not fitted for."""
        check_chunk("vq", self.chunk, steps)
        for dims in widths:
            self._book(dims)
        return self.rounds

    def speech(self, dims: np.ndarray) -> _Speech:
        """Begin to say B chunks: everything is allowed, R times."""
        return _Speech(self, len(dims))

    def _book(self, dims: int) -> np.ndarray:
        if dims not in self.books:
            raise UsageError("policy.codec (vq)", found=f"a robot of {dims} dimensions", expected=f"one of {sorted(self.books)}",
                             fix="fit the codebooks with this robot's data too: vla data tokenizer")  # fmt: skip
        return self.books[dims]

    @classmethod
    def fit(
        cls, chunks: Sequence[np.ndarray], *, rounds: int = 8, codes: int = 256, seed: int = 0, iterations: int = 20,
        fitted: Mapping | None = None, progress: bool = False,
    ) -> VQCodec:  # fmt: skip
        """From chunks (H, a) in [-1, 1] of one H; the same chunks in the same order give the same codebooks.
        Raises `DataError` when there are none, or of several H, and `UsageError` for no rounds or codes."""
        steps, books = check_chunks(chunks), {}
        if rounds < 1 or codes < 1:
            raise UsageError("--rounds, --codes", found=f"{rounds} and {codes}", expected="1 or more of each",
                             fix="--rounds 8 --codes 256")  # fmt: skip
        for dims in sorted({c.shape[1] for c in chunks}):
            rest = np.stack([check_unit(c).reshape(-1) for c in chunks if c.shape[1] == dims]).astype(np.float32)
            rng, book = np.random.default_rng([seed, dims]), []
            for _ in tqdm(range(rounds), desc=f"codebooks of {dims} dimensions", unit="round", disable=not progress):
                centres, nearest = _kmeans(rest, codes, rng, iterations)
                rest = rest - centres[nearest]
                book.append(centres)
            books[dims] = np.stack(book)
        return cls(books, steps, fitted)

    def to_json(self) -> dict:
        books = {str(a): base64.b64encode(book.astype("<f4").tobytes()).decode() for a, book in self.books.items()}
        return {"kind": "vq", "chunk": self.chunk, "rounds": self.rounds, "codes": self.size, "fitted": self.fitted,
                "books": books}  # fmt: skip

    @classmethod
    def from_json(cls, entry: Mapping) -> VQCodec:
        shape = entry["rounds"], entry["codes"]
        books = {int(a): np.frombuffer(base64.b64decode(text), "<f4").reshape(*shape, entry["chunk"] * int(a))
                 for a, text in entry["books"].items()}  # fmt: skip
        return cls(books, entry["chunk"], entry["fitted"])


class _Speech:
    """See `vla.actions.codec.Speech`."""

    def __init__(self, codec: VQCodec, rows: int) -> None:
        self.left, self.all = np.full(rows, codec.rounds), np.ones((rows, codec.size), bool)

    @property
    def done(self) -> np.ndarray:
        return self.left == 0

    def allowed(self) -> np.ndarray:
        return self.all

    def say(self, symbols: np.ndarray) -> None:
        self.left = np.maximum(self.left - 1, 0)


def _kmeans(points: np.ndarray, k: int, rng: np.random.Generator, iterations: int) -> tuple[np.ndarray, np.ndarray]:
    """(F, D) -> centres (k, D) and the nearest of each point (F,). A centre nobody is nearest to moves to the point that is
    worst off; with fewer points than centres some centres are equal."""
    centres = points[rng.choice(len(points), k, replace=len(points) < k)].copy()
    nearest, far = _nearest(points, centres)
    for _ in range(iterations):
        order = nearest.argsort(kind="stable")
        counts = np.bincount(nearest, minlength=k)
        there = np.flatnonzero(counts)
        sums = np.add.reduceat(points[order], np.concatenate([[0], np.cumsum(counts[there])[:-1]]), axis=0)
        centres[there] = sums / counts[there, None]
        empty = np.flatnonzero(counts == 0)[: len(points)]
        centres[empty] = points[far.argsort(kind="stable")[::-1][: len(empty)]]
        before, (nearest, far) = nearest, _nearest(points, centres)
        if (before == nearest).all():
            break
    return centres, nearest


def _nearest(points: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(nearest centre (F,), squared distance to it (F,)), in pieces that fit a cache."""
    nearest, far = np.empty(len(points), np.int64), np.empty(len(points), np.float32)
    norms = np.square(centres).sum(1)
    for first in range(0, len(points), 4096):
        some = points[first : first + 4096]
        distance = norms - 2 * some @ centres.T
        nearest[first : first + 4096] = at = distance.argmin(1)
        far[first : first + 4096] = distance[np.arange(len(some)), at] + np.square(some).sum(1)
    return nearest, far
