"""A server that speaks the chat-completions protocol, as vLLM and llama.cpp do, and says whatever a test wants.

with Chat(lambda body: {"instruction": "touch the red cube", "done": False}) as chat:
    OpenAIPlanner(chat.address, "a model").plan(asked)
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-a-key-that-nobody-may-see"


class Chat:
    """See the module. `answer(body)`: a plan (a mapping, said as JSON), words that are said (a text), or all of it (bytes)."""

    def __init__(self, answer: Callable[[dict[str, Any]], Any], status: int = 200) -> None:
        self.answer, self.status = answer, status
        self.asked: list[dict[str, Any]] = []
        """Bodies, as they came."""
        self.headers: list[dict[str, str]] = []
        self.over = threading.Event()
        chat = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                chat.asked.append(body)
                chat.headers.append({name.lower(): value for name, value in self.headers.items()})
                said = chat.answer(body) if self.path == "/v1/chat/completions" else b"no such path"
                text = said if isinstance(said, str) else json.dumps(said) if not isinstance(said, bytes) else ""
                message = {"role": "assistant", "content": text}
                whole = {"id": "1", "object": "chat.completion", "model": body["model"],
                         "choices": [{"index": 0, "finish_reason": "stop", "message": message}]}  # fmt: skip
                data = said if isinstance(said, bytes) else json.dumps(whole).encode()
                try:
                    self.send_response(chat.status if self.path == "/v1/chat/completions" else 404)
                    self.send_header("content-type", "application/json")
                    self.send_header("content-length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:  # whoever asked is gone
                    self.close_connection = True

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> Chat:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """As a server that was killed: nothing listens any more."""
        self.over.set()
        self._server.shutdown()
        self._server.server_close()
