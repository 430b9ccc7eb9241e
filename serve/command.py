"""`vla serve POLICY`: a policy behind a socket."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

from vla.errors import MachineError, UsageError

_EXAMPLES = """\
examples:
  vla serve runs/demo                                     on this machine only, http://127.0.0.1:8000
  vla serve user/policy --host 0.0.0.0 --token-file tokens    for others: needs a token
  vla serve BASE --adapter-folder kitchen=runs/kitchen --adapter-folder bench=runs/bench
  vla serve runs/demo --config configs/serve/openvla.yaml --compat openvla
  vla serve runs/demo --planner policy                    one checkpoint plans (POST /v1/plan) and acts
  vla serve null:tabletop?ms=20                           no model: to write a robot's side against

clients: serve.client.Client, openpi-client (ws://HOST:PORT/openpi), vla-eval (ws://HOST:PORT/vla-eval), OpenVLA's (POST /act),
curl (POST /v1/act), and a browser.  docs/serving.md
"""


def add_serve_parser(subparsers: Any) -> None:
    """`vla serve`."""
    parser = subparsers.add_parser(
        "serve", help="a policy behind HTTP and WebSockets", description=__doc__, epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("policy", metavar="POLICY", help="a policy folder, a run, an export folder, a Hub id, or null:ROBOT")
    add("--config", type=Path, metavar="FILE", help="YAML with any of serve/settings.py; flags go before it")
    add("--host", help="address to listen on (default 127.0.0.1: this machine only)")
    add("--port", type=int, help="default 8000; 0: any that is free")
    add("--token-file", type=Path, metavar="FILE", help="one token a line; needed to listen beyond this machine")
    add("--certificate", type=Path, metavar="FILE", help="TLS certificate (PEM), with --key")
    add("--key", type=Path, metavar="FILE", help="its key")
    add("--origin", action="append", metavar="URL", help="a page elsewhere that may call")
    add("--robot", help="which robot is meant where a client does not say")
    add("--adapter-folder", action="append", default=[], metavar="NAME=FOLDER", help="adapters on one base, chosen per request")
    add("--adapter", metavar="NAME", help="which adapter is meant where a client does not say")
    add("--camera", action="append", default=[], metavar="NAME=CAMERA", help="what a client calls a camera")
    add("--guard", type=Path, metavar="FILE", help="YAML: robot -> jump, waive, ... of its guard")
    add("--audit", type=Path, metavar="DIR", help="append what was seen (not the frames), said and sent to this log")
    add("--audit-keep", type=int, metavar="N", help="files of 64 MiB of it that stay, the oldest go (default: all)")
    add("--planner", metavar="KIND", help="who answers POST /v1/plan: policy (its own words), scripted:FILE or openai:URL")
    add("--planner-model", metavar="NAME", help="of openai:URL, which model is asked")
    add("--planner-key-file", type=Path, metavar="FILE", help="of openai:URL, the key in the first line of a file")
    add("--compat", action="append", choices=("openvla",), help='openvla: errors are 200 and "error"')
    add("--engine", choices=("process", "thread"), help="where the model is (default: a process of its own)")
    add("--batch", type=int, metavar="N", help="most requests answered together (default 8)")
    add("--queue", type=int, metavar="N", help="most requests that wait (default 64)")
    add("--deadline", type=float, metavar="S", help="seconds a request may take (default 2)")
    add("--drain", type=float, metavar="S", help="seconds to finish accepted work after SIGTERM (default 20)")
    add("--gr00t", type=int, metavar="PORT", help="also answer GR00T's ZMQ clients there")
    add("--replicas", metavar="N|A:B", help="this many, or between A and B, with Ray Serve (serve/ray_app.py)")
    add(
        "--model",
        action="append",
        default=[],
        metavar="NAME=POLICY",
        help="with --replicas: further policies, chosen per request",
    )
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights")
    add("--threads", type=int, metavar="N", help="CPU threads of the policy")
    add("--base", metavar="PATH", help="base of an adapter, where it is not where it was")
    add("--runtime", choices=("int8", "float32"), help="graph of an export folder")
    add("--json", action="store_true", help="log one JSON object a line")
    parser.set_defaults(run=_serve)


def _serve(args: argparse.Namespace) -> int:
    try:
        from serve.server import engine_options, run
        from serve.service import Service
    except ImportError as error:
        raise MachineError("vla serve", found=str(error), expected="the packages of the server",
                           fix='pip install "tendon-vla[serve]"') from error  # fmt: skip
    from serve.engine import Engine

    _log(args.json)
    settings = settings_of(args)
    spec = {"policy": args.policy, "adapters": _pairs("--adapter-folder", args.adapter_folder), "device": args.device,
            "dtype": args.dtype, "threads": args.threads, "base": args.base, "runtime": args.runtime}  # fmt: skip
    if args.replicas or args.model:
        return _replicated(args, spec, settings)
    service = Service(Engine(starter(settings.engine, spec), engine_options(settings)), settings)
    service.starter = lambda changed: starter(settings.engine, spec | changed)
    began = time.monotonic()

    def listening(address: str) -> None:
        print(f"{address}  loading {args.policy} ...", file=sys.stderr, flush=True)
        logging.getLogger("serve").info("listening on %s after %.1f s", address, time.monotonic() - began)

    with asyncio.Runner(loop_factory=_loop()) as runner:
        runner.run(run(service, listening))
    return 0


def _replicated(args: argparse.Namespace, spec: dict[str, Any], settings: Any) -> int:
    from serve.ray_app import replicas_of, run

    specs = {"": spec} | {name: spec | {"policy": path, "adapters": {}} for name, path in _pairs("--model", args.model).items()}
    run(
        specs,
        settings,
        replicas_of(args.replicas or "1"),
        lambda address: print(f"{address}  ready", file=sys.stderr, flush=True),
    )
    return 0


def starter(where: str, spec: dict[str, Any]) -> Any:
    """What starts a backend with the policy of `spec`."""
    from serve.backend import ProcessBackend, ThreadBackend

    kind = ProcessBackend if where == "process" else ThreadBackend
    return lambda: kind.start(spec)


def settings_of(args: argparse.Namespace) -> Any:
    """The file's settings, with the flags over them. Raises `UsageError`."""
    import yaml
    from pydantic import ValidationError

    from serve.settings import ServeSettings

    values = _read(yaml, args.config) if args.config else {}
    if args.guard:
        values["guard"] = _mapping(values, "guard", args.config) | _read(yaml, args.guard)
    if args.camera:
        values["cameras"] = _mapping(values, "cameras", args.config) | _pairs("--camera", args.camera)
    flags = {"host", "port", "token_file", "certificate", "key", "robot", "adapter", "audit", "audit_keep", "compat", "engine",
             "batch", "queue", "deadline", "drain", "gr00t"}  # fmt: skip
    values |= {name: value for name in flags if (value := getattr(args, name)) is not None}
    planner = {"kind": args.planner, "model": args.planner_model, "key_file": args.planner_key_file}
    if planner := {name: value for name, value in planner.items() if value is not None}:
        values["planner"] = _mapping(values, "planner", args.config) | planner
    if args.origin:
        values["origins"] = args.origin
    if bool(values.get("certificate")) != bool(values.get("key")):
        raise UsageError("TLS", found="one of --certificate and --key", expected="both", fix="give the other one as well")
    try:
        return ServeSettings.model_validate(values)
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False, include_input=False)]
        raise UsageError(args.config or "vla serve", found="; ".join(wrong), expected="settings of serve/settings.py",
                         fix="vla serve --help") from None  # fmt: skip


def _mapping(values: dict[str, Any], name: str, path: Path | None) -> dict[str, Any]:
    """An entry of the file that flags add to."""
    entry = values.get(name) or {}
    if not isinstance(entry, dict):
        raise UsageError(f"{path}, {name}", found=type(entry).__name__, expected="a mapping", fix="see configs/serve/")
    return entry


def _read(yaml: Any, path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(path, found=str(error)[:300], expected="a YAML file", fix="see configs/serve/") from error
    if not isinstance(content, dict):
        raise UsageError(path, found=type(content).__name__, expected="a mapping", fix="see configs/serve/")
    return content


def _pairs(flag: str, given: list[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in given]
    if any(not (name and sign and value) for name, sign, value in pairs) or len({p[0] for p in pairs}) != len(pairs):
        raise UsageError(flag, found=given, expected="NAME=VALUE, every name once", fix=f"{flag} NAME=VALUE")
    return {name: value for name, _, value in pairs}


def _loop() -> Any:
    """uvloop's where it is installed: a message costs less there."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        said = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            said["traceback"] = self.formatException(record.exc_info)
        return json.dumps(said)


def _log(lines: bool) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines() if lines else logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
