"""An OpenAI-compatible chat server on loopback that misbehaves on purpose, in a way that its seed decides.

What it answers depends on the prompt and the seed of the request alone, so an undisturbed run and one through any
number of faults and kills must end with the same completions.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = ("slow", "429", "500", "503", "half", "garbage", "list", "no choices", "two choices", "close", "reset")


def default_answer(text: str, seed: int) -> str:
    digest = hashlib.sha256(f"{text} {seed}".encode()).digest()
    label = ("Exact", "Substitute", "Complement", "Irrelevant")[digest[0] % 4]
    return f"<think>\nreason {digest.hex()[:12]} ≠ 日本\n</think>\n\n{json.dumps({'label': label})}"


@dataclass
class ChatServer:
    """A running server.

    Attributes:
        models: What it says it has; others get 404.
        faults: Kinds of misbehaviour, of `FAULTS`; none: it behaves.
        refused_options: Fields that it answers with 422, as `transformers serve` does.
        key: The bearer token it asks for.
        answer: Text of a completion from its messages and seed.
        asked: How often each (messages, seed) was asked; `answered`: how often it was answered in full.
        arrivals: When each chat request came in.
        dead: True: it closes every connection without a word.
        die_after: Answers after which it is dead.
        refuse: Tells from the last message whether to answer 400.
    """

    models: Sequence[str] = ("tiny",)
    faults: Sequence[str] = ()
    refused_options: Sequence[str] = ()
    key: str | None = None
    retry_after: str = "0.05"
    delay: float = 0.0
    die_after: int | None = None
    refuse: Callable[[str], bool] = lambda text: False
    answer: Callable[[str, int], str] = default_answer
    url: str = ""
    asked: Counter = field(default_factory=Counter)
    answered: Counter = field(default_factory=Counter)
    bodies: list[dict] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    headers: list[dict] = field(default_factory=list)
    dead: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def serve_chat(**options: object) -> Iterator[ChatServer]:
    """Serve until the block ends; `port` (default: a free one) lets a server come back at its old address."""
    port = options.pop("port", 0)
    server = _Server(("127.0.0.1", port), _Handler)
    server.chat = ChatServer(**options)
    server.chat.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server.chat
    finally:
        server.shutdown()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address):
        """A client that was killed is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        """Keep the tests' output quiet."""

    def do_GET(self):
        chat = self.server.chat
        if chat.dead:
            self.close_connection = True
            return
        self._send(200, json.dumps({"object": "list", "data": [{"id": name} for name in chat.models]}).encode())

    def do_POST(self):
        chat = self.server.chat
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        probe = body.get("max_tokens") == 1
        with chat.lock:
            chat.arrivals.append(time.monotonic())
            chat.headers.append(dict(self.headers))
            chat.bodies.append(body)
        if chat.dead:
            self.close_connection = True
            return
        if chat.key and self.headers.get("Authorization") != f"Bearer {chat.key}":
            self._send(401, b'{"error": "wrong key"}')
            return
        if body["model"] not in chat.models:
            self._send(404, json.dumps({"error": f"The model {body['model']!r} does not exist."}).encode())
            return
        if unexpected := set(body) & set(chat.refused_options):
            self._send(422, json.dumps({"detail": f"Unexpected fields in the request: {unexpected}"}).encode())
            return
        text = json.dumps(body["messages"], sort_keys=True)
        if chat.refuse(body["messages"][-1]["content"]):
            self._send(400, b'{"error": "This model\'s maximum context length is 10 tokens."}')
            return
        identity = (text, body.get("seed"))
        with chat.lock:
            chat.asked[identity] += 1
            attempt = chat.asked[identity]
        fault = None if probe or not chat.faults else _fault(chat.faults, identity, attempt)
        if fault == "slow":
            time.sleep(0.1)
        elif fault is not None:
            self._misbehave(fault)
            return
        time.sleep(chat.delay)
        with chat.lock:
            if chat.dead:
                self.close_connection = True
                return
            if not probe:
                chat.answered[identity] += 1
            chat.dead = chat.die_after is not None and sum(chat.answered.values()) >= chat.die_after
        self._send(200, _completion(chat.answer(text, body.get("seed"))))

    def _misbehave(self, fault: str):
        good = _completion("half")
        if fault == "429":
            self._send(429, b'{"error": "slow down"}', {"Retry-After": self.server.chat.retry_after})
        elif fault in ("500", "503"):
            self._send(int(fault), b"<html>oops</html>")
        elif fault == "half":
            self._send(200, good[: len(good) // 2], length=len(good))
            self.close_connection = True
        elif fault == "garbage":
            self._send(200, good[: len(good) // 2])
        elif fault == "list":
            self._send(200, b"[1, 2]")
        elif fault == "no choices":
            self._send(200, b'{"choices": []}')
        elif fault == "two choices":
            choice = json.loads(good)["choices"][0]
            self._send(200, json.dumps({"choices": [choice, choice]}).encode())
        else:  # close: before a word; reset: with bytes that are no HTTP
            if fault == "reset":
                self.wfile.write(b"\x00\x01not http\r\n\r\n")
            self.close_connection = True

    def _send(self, status: int, content: bytes, headers: dict | None = None, length: int | None = None):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)


def _fault(faults: Sequence[str], identity: tuple, attempt: int) -> str | None:
    """Decide by the request: none to three bad answers, then a good one."""
    digest = hashlib.sha256(repr(identity).encode()).digest()
    if attempt > digest[0] % 4:
        return None
    return faults[digest[attempt] % len(faults)]


def _completion(text: str) -> bytes:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    usage = {"prompt_tokens": 3, "completion_tokens": len(text.split()), "total_tokens": 9}
    return json.dumps({"id": "x", "created": 0, "model": "tiny", "choices": [choice], "usage": usage}).encode()
