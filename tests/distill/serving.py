"""A server for tests: ``python serving.py MODEL PORT [how]``. It says which model it was started over.

``dies`` ends at once, ``later`` after some answers; ``child`` starts a process of its own and notes its number.
``pinned`` lists nothing, and ``cached`` other models; both take the name of their own model alone. ``any`` lists other
models, too, and takes every name. The others take the name they list alone. ``weights`` says which ones it serves.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HOW = sys.argv[3] if len(sys.argv) > 3 else ""
OWN = f"served {Path(sys.argv[1]).name}"
given = 0


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if HOW == "pinned" and self.path == "/v1/models":
            return self.send_error(500)
        if HOW in ("cached", "any"):
            return self._reply({"data": [{"id": "org/other"}, {"id": "org/another"}]})
        self._reply({"data": [{"id": OWN}]})

    def do_POST(self) -> None:
        global given
        given += 1
        if HOW == "later" and given > 3:
            print("out of memory", flush=True)
            os._exit(3)
        time.sleep(0.02)
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if HOW in ("pinned", "cached") and asked["model"] != sys.argv[1]:
            return self.send_error(400, "pinned to another model")
        if HOW not in ("pinned", "cached", "any") and asked["model"] != OWN:
            return self.send_error(404, "no such model")
        text = f"{asked['model']}: {asked['messages'][-1]['content']} {asked['seed']}"
        if HOW == "weights":
            text = f"weights {sum(Path(sys.argv[1], 'model.safetensors').read_bytes())} {asked['seed']}"
        self._reply({"choices": [{"index": 0, "finish_reason": "stop", "message": {"content": text}}]})

    def _reply(self, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    if HOW == "dies":
        sys.exit("no GPU here")
    if HOW == "child":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path(sys.argv[1]).parent.joinpath("child").write_text(str(child.pid))
    print("ready", flush=True)
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
