"""The client of a SandboxFusion service, against a small service on the loopback that speaks its protocol."""

from __future__ import annotations

import base64
import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rewards.code_remote import SandboxFusion

SUM = {"style": "stdio", "cases": [{"stdin": "3 4", "stdout": "7"}, {"stdin": "1 1", "stdout": "2"}]}
ADD = {
    "style": "function",
    "entry_point": "add",
    "cases": [{"args": [3, 4], "expected": 7}, {"args": [1, 1], "expected": 2}],
}


class Service(http.server.BaseHTTPRequestHandler):
    """`POST /run_code` as documented: files and code in a folder, the output and the way it ended."""

    failures = 0
    folder: Path

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if type(self).failures > 0:
            type(self).failures -= 1
            self.send_error(503)
            return
        for name, data in request["files"].items():
            (self.folder / name).write_bytes(base64.b64decode(data))
        (self.folder / "main.py").write_text(request["code"])
        try:
            run = subprocess.run(
                [sys.executable, "main.py"],
                cwd=self.folder,
                input=request["stdin"],
                capture_output=True,
                text=True,
                timeout=request["run_timeout"],
            )
            status = "Finished" if run.returncode == 0 else "Error"
            result: dict[str, Any] = {"status": status, "return_code": run.returncode, "stdout": run.stdout}
        except subprocess.TimeoutExpired:
            result = {"status": "TimeLimitExceeded", "return_code": None, "stdout": ""}
        body = json.dumps({"status": "Success", "message": "", "run_result": result}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def service(tmp_path: Path) -> Iterator[tuple[SandboxFusion, type[Service]]]:
    handler = type("Handler", (Service,), {"folder": tmp_path})
    server = http.server.HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield SandboxFusion(f"http://127.0.0.1:{server.server_port}/", retries=1), handler
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("program", "problem", "reward"),
    [
        ("print(sum(map(int, input().split())))", SUM, 1.0),
        ("print(7)", SUM, 0.5),
        ("print(sum(map(int, input().split())))\nraise SystemExit(1)", SUM, 0.0),
        ("def add(a, b): return a + b", ADD, 1.0),
        ("class Solution:\n    def add(self, a, b):\n        print('noise')\n        return a + b", ADD, 1.0),
        ("def add(a, b): return 7", ADD, 0.5),
        ("class E:\n    def __eq__(self, o): return True\ndef add(a, b): return E()", ADD, 0.0),
        ('import os\nprint(\'[{"v": true}, {"v": true}]\')\nos._exit(0)', ADD, 0.0),
        ("def add(a, b", ADD, 0.0),
    ],
)
def test_programs_are_scored(
    service: tuple[SandboxFusion, type[Service]], program: str, problem: dict[str, Any], reward: float
) -> None:
    assert service[0].score_program(program, problem).reward == reward


def test_a_timeout_is_told(service: tuple[SandboxFusion, type[Service]]) -> None:
    result = service[0].score_program("while True: pass", {**SUM, "cases": SUM["cases"][:1]}, limits={"wall_s": 0.5})
    assert (result.reward, result.status) == (0.0, "timeout")


def test_a_failing_service_is_tried_again_and_then_reported(service: tuple[SandboxFusion, type[Service]]) -> None:
    client, handler = service
    handler.failures = 1
    assert client.score_program("print(7)", SUM).reward == 0.5
    handler.failures = 2
    result = client.score_program("print(7)", SUM)
    assert (result.reward, result.status) == (None, "error")
    assert "failed 2 times" in result.detail


def test_tests_are_not_sent_where_they_can_be_forged() -> None:
    client = SandboxFusion("http://127.0.0.1:1")
    with pytest.raises(ValueError, match="style must be stdio or function for a remote sandbox, got 'assert'"):
        client.score_program("pass", {"style": "assert", "entry_point": "f", "tests": "assert f()"})
    with pytest.raises(ValueError, match=r"sandbox\.url must start with"):
        SandboxFusion("file:///etc/passwd")
