"""A stand-in for vLLM's command, for what surrounds the real one: `stand_in.py serve MODEL …`.

It answers as vLLM's HTTP server does, writes its arguments beside itself, and ends at once with an error if they have
--fail.
"""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any


class Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.reply(200, {"version": "0.0.0"} if self.path == "/version" else None)

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "--refuse" in sys.argv:
            self.reply(404, {"error": {"message": f"The model `{asked['model']}` does not exist."}})
            return
        self.send_response(200)
        self.end_headers()
        key = "token_ids" if "--old" not in sys.argv else "text"
        # Two tokens in one event, as when a client is slow.
        numbers = list(range(asked["max_tokens"]))
        for part in [numbers[:1], numbers[1:3], *([one] for one in numbers[3:])]:
            self.say({"choices": [{key: part}]})
        self.wfile.write(b"data: [DONE]\n\n")

    def say(self, value: Any) -> None:
        self.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")

    def reply(self, status: int, value: Any) -> None:
        text = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    with Path(__file__).with_name("asked.jsonl").open("a") as file:
        file.write(json.dumps(sys.argv[1:]) + "\n")
    if "--fail" in sys.argv:
        raise SystemExit("loading\nValueError: Unknown quantization method: bitsandbytes.\nthe last words")
    HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Answers).serve_forever()
