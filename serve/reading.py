"""JSON from strangers: no key twice, no NaN or infinity, no endless nesting, json-numpy's arrays checked before they are made."""

from __future__ import annotations

import base64
import binascii
import json
import math
from typing import Any

from serve.wire import LIMITS, Limits, WireError, array_of


def read_json(body: bytes | str, arrays: bool = False, limits: Limits = LIMITS) -> Any:
    """One JSON value; with `arrays`, json-numpy's `{"__numpy__", "dtype", "shape"}` become arrays (0-d ones scalars).

    Raises `WireError`.
    """
    if len(body) > limits.message:
        raise WireError("body", found=f"{len(body):,} bytes", expected=f"at most {limits.message:,}", fix="send smaller pictures",
                        too_large=True)  # fmt: skip

    def mapping(pairs: list[tuple[str, Any]]) -> Any:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            raise _wrong("a key twice in one object", "every key once")
        return _array(entries) if arrays and "__numpy__" in entries else entries

    try:
        text = body if isinstance(body, str) else body.decode("utf-8")
        if sum(map(text.count, ",[{")) > limits.values:  # each may be an object of 64 bytes
            raise WireError("body", found=f"more than {limits.values:,} values", expected="fewer: pictures and states are arrays",
                            fix="see GET /openapi.json", too_large=True)  # fmt: skip
        return json.loads(text, object_pairs_hook=mapping, parse_constant=_no_number, parse_float=_finite)
    except WireError:
        raise
    except RecursionError:
        raise _wrong("nesting without end", "a few levels") from None
    except ValueError as error:  # of JSON, of UTF-8, of an integer with too many digits
        raise _wrong(f"not JSON: {str(error)[:120]}", "one JSON value in UTF-8") from None


def _array(entry: dict[str, Any]) -> Any:
    data = entry["__numpy__"]
    if not isinstance(data, str):
        raise _wrong(f"__numpy__ that is {type(data).__name__}", "base64")
    try:
        raw = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _wrong(f"__numpy__ that is not base64: {error}", "base64") from None
    array = array_of(raw, entry.get("dtype"), entry.get("shape"))
    return array if array.shape else array[()]


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise _wrong(f"{text[:20]}", "a finite number")
    return value


def _no_number(text: str) -> Any:
    raise _wrong(text, "a finite number")


def _wrong(found: str, expected: str) -> WireError:
    return WireError("body", found=found, expected=expected, fix="see GET /openapi.json")
