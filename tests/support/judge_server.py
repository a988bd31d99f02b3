"""An OpenAI-compatible endpoint on loopback that plays a judge, or a server of the model: a real HTTP server, in threads of this process."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Asked:
    """A request. seen: how often its body came before; number: its place among all requests, from 0."""

    body: dict[str, Any]
    text: str
    images: list[str]
    headers: dict[str, str]
    seen: int
    number: int

    @property
    def answer(self) -> str:
        """The answer to rate, in the built-in template."""
        found = re.search(r"\nAnswer:\n(.*?)\n\nRate the answer", self.text, re.S)
        return found[1] if found else ""

    @property
    def answers(self) -> tuple[str, str] | None:
        """The answers to compare, in the built-in template."""
        found = re.search(r"\nAnswer A:\n(.*?)\n\nAnswer B:\n(.*?)\n\nWhich answer", self.text, re.S)
        return (found[1], found[2]) if found else None

    @property
    def truth(self) -> str:
        """What the judge was told of the truth."""
        found = re.search(r"^- correct answer: (.*)$", self.text, re.M)
        return found[1] if found else ""


@dataclass(frozen=True)
class Said:
    """What goes back where it is no completion. held: not before the server closes; drip: a byte at a time, without end;
    dropped: nothing, and the connection is cut, as by a kill."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    held: bool = False
    drip: bool = False
    dropped: bool = False


Plays = Callable[[Asked], "str | Said"]


class JudgeServer:
    """`with JudgeServer(plays) as server`: `plays` gives the text of the reply to a request, or `Said`. `asked` is all that came.

    serves: the models that it says it has; None: it does not say. port: 0 for any that is free.
    """

    def __init__(self, plays: Plays, *, serves: list[str] | None = None, port: int = 0) -> None:
        self.asked: list[Asked] = []
        self.closing = threading.Event()
        self._plays, self._lock = plays, threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                owner._serve(self)

            def do_GET(self) -> None:
                known = serves is not None and self.path == "/v1/models"
                data = json.dumps({"object": "list", "data": [{"id": name} for name in serves or ()]}).encode()
                owner._send(self, Said(body=data) if known else Said(404))

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def port(self) -> int:
        return self._server.server_port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> JudgeServer:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        data = handler.rfile.read(int(handler.headers["Content-Length"]))
        body = json.loads(data)
        content = body["messages"][0]["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        with self._lock:
            asked = Asked(
                body=body,
                text="".join(part.get("text", "<image>") for part in parts),
                images=[part["image_url"]["url"] for part in parts if part["type"] == "image_url"],
                headers={name.lower(): value for name, value in handler.headers.items()},
                seen=sum(each.body == body for each in self.asked),
                number=len(self.asked),
            )
            self.asked.append(asked)
        said = self._plays(asked)
        if isinstance(said, str):
            said = Said(body=completion(said))
        # A client may have given up.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._send(handler, said)

    def _send(self, handler: BaseHTTPRequestHandler, said: Said) -> None:
        if said.held:
            self.closing.wait(30)
        if said.dropped:
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RDWR)
            return
        handler.send_response(said.status)
        for name, value in said.headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", "1000000" if said.drip else str(len(said.body)))
        handler.end_headers()
        while said.drip and not self.closing.wait(0.01):
            handler.wfile.write(b" ")
            handler.wfile.flush()
        handler.wfile.write(said.body)


def completion(text: str | None, **changes: Any) -> bytes:
    """A chat completion with this reply."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop", **changes}
    return json.dumps({"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}}).encode()


def ratings(value: float, **changes: float) -> str:
    """A reply with this rating for each of the five attributes."""
    names = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    return json.dumps({name: value for name in names} | changes)
