"""A server with the chat completions of the OpenAI API that does what a script says: answer, fail, stall, close."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def good(body: dict[str, Any]) -> str:
    """Return an answer of the right form to any of the prompts."""
    system = body["messages"][0]["content"]
    if '"explanation"' in system:
        return json.dumps({"explanation": "numbers such as 1"})
    if '"intruder"' in system:
        return json.dumps({"intruder": 1})
    return json.dumps({"answers": [1] * int(re.findall(r"with (\d+) numbers", system)[0])})


def answer(text: str, finish_reason: str = "stop", refusal: str | None = None, usage: bool = True) -> tuple:
    message = {"role": "assistant", "content": text, "refusal": refusal}
    body = {"id": "x", "object": "chat.completion", "created": 0, "model": "scripted"}
    body |= {"choices": [{"index": 0, "message": message, "finish_reason": finish_reason}]}
    if usage:
        body["usage"] = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return 200, json.dumps(body), {}


def failure(status: int, message: str = "no", code: str | None = None, **headers: str) -> tuple:
    named = {key.replace("_", "-"): value for key, value in headers.items()}
    return status, json.dumps({"error": {"message": message, "code": code}}), named


class ScriptedServer:
    """`act(body, number)` returns status, content and headers; "close" closes the connection; a callable runs first."""

    def __init__(self, act: Callable[[dict[str, Any], int], Any]):
        self.act, self.lock = act, threading.Lock()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.answered: list[str] = []
        self.held = 0
        self.now = self.most = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                body = json.loads(raw)
                with outer.lock:
                    number = len(outer.bodies)
                    outer.bodies.append(body)
                    outer.headers.append({key.lower(): value for key, value in self.headers.items()})
                    outer.times.append(time.monotonic())
                    outer.now += 1
                    outer.most = max(outer.most, outer.now)
                try:
                    done = outer.act(body, number)
                    if done == "close":
                        self.close_connection = True
                        return
                    status, content, headers = done
                    self.send_response(status)
                    for key, value in ({"Content-Type": "application/json"} | headers).items():
                        self.send_header(key, value)
                    self.send_header("Content-Length", str(len(content.encode())))
                    self.end_headers()
                    self.wfile.write(content.encode())
                    if status == 200:
                        with outer.lock:
                            outer.answered.append(json.dumps(body["messages"]))
                except OSError:
                    self.close_connection = True
                finally:
                    with outer.lock:
                        outer.now -= 1

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self) -> ScriptedServer:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()
