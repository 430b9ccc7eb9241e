"""What a server says instead of an action: a code for programs, a status for HTTP, words for people, and when to come again."""

from __future__ import annotations

import logging
from typing import Any

from vla.errors import MachineError, VLAError

logger = logging.getLogger(__name__)

STATUS = {
    "bad_request": 422, "unauthorized": 401, "forbidden": 403, "not_found": 404, "too_large": 413, "unsupported": 415,
    "stale": 409, "hold": 409, "needs_help": 409, "busy": 429, "unavailable": 503, "late": 504, "internal": 500,
    "bad_answer": 502, "conflict": 409,
}  # fmt: skip
"""Code -> HTTP status. `busy`: more is asked than can be answered in time. `unavailable`: starting, restarting or draining.
`late`: the deadline passed. `stale`: an observation older than allowed, or out of order. `hold`, `needs_help`: the guard's.
`bad_answer`: what a planner said is no plan. `conflict`: it came too late, or something else goes on (`serve/station.py`)."""


class Refusal(VLAError):
    """Why there is no action. Raised towards one client; the server goes on."""

    def __init__(
        self, code: str, *, where: object = "server", found: object, expected: object, fix: str, retry_after: float | None = None
    ) -> None:  # fmt: skip
        """`code` is one of `STATUS`; `retry_after` s, when trying again makes sense."""
        super().__init__(where, found=found, expected=expected, fix=fix)
        self.code, self.status, self.retry_after = code, STATUS[code], retry_after

    def to_json(self) -> dict[str, object]:
        """{"error": {"code", "where", "found", "expected", "fix", "retry_after"?}}."""
        words = {"where": self.where, "found": self.found, "expected": self.expected, "fix": self.fix}
        # Half a surrogate, which JSON can say, is in no encoding.
        said = {"code": self.code, **{name: text.encode("utf-8", "replace").decode() for name, text in words.items()}}
        return {"error": said if self.retry_after is None else said | {"retry_after": round(self.retry_after, 3)}}

    @classmethod
    def from_json(cls, entry: Any) -> Refusal:
        """What `to_json` made of one, with bounds on its words. Raises `ValueError` for something else."""
        said = entry.get("error") if isinstance(entry, dict) else None
        if not isinstance(said, dict) or said.get("code") not in STATUS:
            raise ValueError("no refusal")
        where, found, expected, fix = (str(said.get(name, ""))[:1000] for name in ("where", "found", "expected", "fix"))
        after: Any = said.get("retry_after")
        return cls(said["code"], where=where, found=found, expected=expected, fix=fix,
                   retry_after=float(after) if type(after) in (int, float) else None)  # fmt: skip

    @classmethod
    def of(cls, error: Exception) -> Refusal:
        """What went wrong, as the client hears it: a `VLAError` in its words; anything else is a mistake of ours, and goes into
        the log."""
        if isinstance(error, Refusal):
            return error
        if not isinstance(error, VLAError):
            logger.error("an answer came to nothing", exc_info=error)
            return cls("internal", found=type(error).__name__, expected="an answer", fix="see the server's log")
        if isinstance(error, MachineError):  # ours, not theirs
            return cls("internal", where=error.where, found=error.found, expected=error.expected, fix=error.fix)
        code = "too_large" if getattr(error, "too_large", False) else "bad_request"
        return cls(code, where=error.where, found=error.found, expected=error.expected, fix=error.fix)


def unavailable(found: str, retry_after: float = 1.0) -> Refusal:
    return Refusal("unavailable", found=found, expected="a policy that is ready", fix="try again later", retry_after=retry_after)
