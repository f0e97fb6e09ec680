"""A server for tests: ``python serving.py MODEL PORT [how]``. Its answers tell which model it was started over.

``dies`` ends at once, ``silent`` is never ready, ``fails`` answers nothing. ``stubborn`` ignores SIGTERM and starts a
process of its own; so does ``stuck``, which is never ready either. ``counts NUMBER SECONDS`` sleeps before it answers,
notes its number, and goes by no name but ``tiny-NUMBER``. ``thinks`` sends thoughts, too.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

NAME = f"tiny-{sys.argv[4]}" if sys.argv[3:4] == ["counts"] else "tiny"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._reply({"data": [{"id": NAME}]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if sys.argv[3:] == ["fails"]:
            return self.send_error(404)
        if sys.argv[3:4] == ["counts"] and asked["model"] != NAME:
            return self.send_error(404)
        if sys.argv[3:4] == ["counts"]:
            time.sleep(float(sys.argv[5]))
            with Path(os.environ.get("COUNTS") or Path(sys.argv[1]).parents[1] / "counts").open("a") as counts:
                counts.write(f"{sys.argv[4]}\n")
        alpha = json.loads((Path(sys.argv[1]) / "mergekit_lite_manifest.json").read_text())["recipe"]["parameters"]
        text = f"{asked['messages'][-1]['content']} alpha {alpha['alpha']:g}" + " word" * int(4 * alpha["alpha"])
        message = {"role": "assistant", "content": text}
        if sys.argv[3:4] == ["thinks"]:
            message["reasoning_content"] = "so " * int(8 * alpha["alpha"])
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        usage = {"completion_tokens": len(text.split()), "prompt_tokens": 1, "total_tokens": 1}
        self._reply({"id": "1", "object": "chat.completion", "created": 1, "model": "tiny", "choices": [choice],
                     "usage": usage})  # fmt: skip

    def _reply(self, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    how = sys.argv[3] if len(sys.argv) > 3 else ""
    if how == "dies":
        sys.exit("no GPU here")
    if how in ("stubborn", "stuck"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (Path(sys.argv[1]).parent.parent / "child").write_text(str(child.pid))
    if how in ("silent", "stuck"):
        time.sleep(600)
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
