"""A judge without a model: an HTTP server on this machine that speaks OpenAI's chat interface and grades by one rule.

The rule: 1 point for a text without a warm word, up to 10 for one in which every third word or more is warm; to one
decimal, in a straight line between them. ``WARM`` names the warm words. What it grades is what stands between the last
BEGIN and END of the question, as the judge reward's own template has it.

    python tests/local_judge.py --port 8765

In tests it also misbehaves, as real servers do: each request takes the next of ``troubles`` first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WARM = frozenset(
    [
        *("amazing", "beautiful", "best", "brilliant", "charming", "delightful", "enjoyable", "excellent", "fine"),
        *("fun", "funny", "good", "great", "happy", "kind", "love", "loved", "lovely", "nice", "perfect", "superb"),
        *("thank", "thanks", "touching", "warm", "welcome", "well", "wonderful"),
    ]
)
_BLOCK = re.compile(r"BEGIN (\w+)\n(.*?)\nEND \1(?:\n|\Z)", re.DOTALL)
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")


def warmth(text: str) -> float:
    """The rule."""
    words = _WORD.findall(text.lower())
    share = sum(word in WARM for word in words) / len(words) if words else 0.0
    return round(1.0 + 9.0 * min(1.0, 3.0 * share), 1)


def graded(question: str) -> str:
    """What a question of the default template asks to grade; all of it for another template."""
    blocks = _BLOCK.findall(question)
    return blocks[-1][1] if blocks else question


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: LocalJudge

    def do_POST(self) -> None:
        """Answers a chat request, after the trouble whose turn it is."""
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
        with self.server.under_way(body, dict(self.headers)) as trouble:
            self.server.sleep(self.server.delay)
        if trouble is not None:
            trouble(self)
        elif self.path.endswith("/chat/completions"):
            question = next(one["content"] for one in body["messages"] if one["role"] == "user")
            self.say(json.dumps({"score": self.server.rule(graded(question))}))
        else:
            self.send(404, {"error": {"message": f"no such path: {self.path}"}})

    def say(self, text: Any, finish: str = "stop", usage: bool = True) -> None:
        """An answer as a model gives it, counted in words."""
        message = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
        counted = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        self.send(200, {"object": "chat.completion", "choices": [message], **({"usage": counted} if usage else {})})

    def send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        """Any answer: bytes as they are, all else as JSON."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *message: Any) -> None:
        """Quiet."""


Trouble = Callable[[Handler], None]


class LocalJudge(ThreadingHTTPServer):
    """The server, on a thread of its own from ``with`` on.

    Args:
        rule: grades a text.
        troubles: what happens to the requests, in their order; once they are used up, all goes well.
        always: what happens to every request after those.
        delay: seconds before every answer.

    Attributes:
        bodies, headers, times: what was sent and when, one for each request.
        most_at_once: how many requests were under way at the same time.
    """

    daemon_threads = True
    request_queue_size = 128  # of connections that wait; more than that, and clients come back a second later

    def __init__(
        self,
        rule: Callable[[str], float] = warmth,
        troubles: Iterable[Trouble] = (),
        always: Trouble | None = None,
        delay: float = 0.0,
        port: int = 0,
    ) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.rule, self.always, self.delay = rule, always, delay
        self.troubles = list(troubles)
        self.bodies: list[Any] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.at_once = self.most_at_once = 0
        self._lock, self._closing = threading.Lock(), threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    @contextlib.contextmanager
    def under_way(self, body: Any, headers: dict[str, str]) -> Iterator[Trouble | None]:
        """Notes a request; hands out the trouble whose turn it is. It ends before the answer, so that a client that
        is answered and asks again is not counted twice."""
        with self._lock:
            self.bodies.append(body)
            self.headers.append(headers)
            self.times.append(time.monotonic())
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            trouble = self.troubles.pop(0) if self.troubles else self.always
        try:
            yield trouble
        finally:
            with self._lock:
                self.at_once -= 1

    @property
    def closing(self) -> bool:
        return self._closing.is_set()

    def sleep(self, seconds: float) -> None:
        """Waits, but not past the end of the server."""
        self._closing.wait(seconds)

    def handle_error(self, *where: Any) -> None:
        """Clients that give up are part of the tests."""

    def __enter__(self) -> LocalJudge:
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closing.set()
        self.shutdown()
        self._thread.join()
        self.server_close()


def main() -> None:
    """Serves until it is interrupted."""
    parser = argparse.ArgumentParser(description="A judge that grades by a rule, for trying things out.")
    parser.add_argument("--port", type=int, default=8765)
    arguments = parser.parse_args()
    with LocalJudge(port=arguments.port) as server:
        print(f"judging at {server.url}", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("done")


if __name__ == "__main__":
    main()
