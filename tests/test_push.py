"""moce push: what arrives at a hub, here a small server that speaks the part of its protocol."""

from __future__ import annotations

import base64
import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from commands import one_line, run_command
from huggingface_hub import ModelCard, constants

REPO = "somebody/birds"


class Hub(ThreadingHTTPServer):
    """files: what the last commit brought; created: bodies of requests for a new model."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.created: list[dict] = []
        self.validated: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def answer(self, content: dict, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        good = self.headers["Authorization"] == "Bearer hf_good"
        self.answer({"name": "somebody"} if good else {"error": "bad token"}, 200 if good else 401)

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length")
        body = self.rfile.read(int(length)) if length else self._chunks()
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self.answer({"url": f"{self.server.url}/{REPO}"})
        elif self.path == "/api/validate-yaml":
            self.server.validated.append(json.loads(body)["content"])
            self.answer({"warnings": [], "errors": []})
        elif self.path == f"/api/models/{REPO}/preupload/main":
            files = [
                {**f, "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif self.path == f"/api/models/{REPO}/commit/main":
            for line in body.splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    content = base64.b64decode(item["value"]["content"])
                    self.server.files[item["value"]["path"]] = content
            self.answer(
                {
                    "success": True,
                    "commitOid": "0" * 40,
                    "commitUrl": f"{self.server.url}/{REPO}/commit/0",
                }
            )
        else:
            self.answer({"error": f"no {self.path}"}, 404)

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        return body


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def push(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> Callable[..., tuple[int, str]]:
    """`moce push` to a hub, with nothing but these variables: its exit status, and what it printed."""

    def run(folder: Path, url: str, *words: str, token: str = "hf_good") -> tuple[int, str]:
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_ENDPOINT", url)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        status = run_command(["push", folder, *(words or (REPO,))])
        printed = capsys.readouterr()
        return status, printed.err if status else printed.out

    return run


def test_a_backbone_arrives_with_a_card_that_loads_it_from_there(hub: Hub, runs, push) -> None:
    status, printed = push(runs.backbone, hub.url, REPO, "--private", "--license", "mit")
    assert status == 0, printed
    assert f"{hub.url}/{REPO}" in printed
    assert hub.created[0]["name"] == "birds" and hub.created[0]["organization"] == "somebody"
    (created,) = hub.created
    assert created.get("visibility") == "private" or created["private"]
    assert hub.files.keys() == {
        *("README.md", "config.json", "model.safetensors", "selection.json", "chart.png")
    }
    weights = (runs.backbone / "model.safetensors").read_bytes()
    assert hub.files["model.safetensors"] == weights
    card = ModelCard(hub.files["README.md"].decode())
    assert card.data.license == "mit" and card.data.library_name == "timm"
    assert f'timm.create_model("hf-hub:{REPO}", pretrained=True)' in card.text
    assert "local-dir" not in card.text
    assert hub.validated == [hub.files["README.md"].decode()]
    assert "local-dir:." in (runs.backbone / "README.md").read_text(), "the folder is unchanged"


@pytest.mark.parametrize(
    ("token", "message"),
    [("", "not logged in to the hub"), ("hf_bad", "does not accept the token")],
)
def test_without_a_valid_token_nothing_is_created(
    token: str, message: str, hub: Hub, runs, push
) -> None:
    status, printed = push(runs.backbone, hub.url, token=token)
    assert status == 2 and message in one_line(printed)
    assert not hub.created and not hub.files


def test_without_a_hub_it_says_so(runs, push) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
    status, printed = push(runs.backbone, nowhere)
    assert status == 2 and f"cannot reach the hub {nowhere}" in one_line(printed)


@pytest.mark.parametrize(
    ("folder", "repo", "message"),
    [
        ("mae", REPO, "has no README.md"),
        ("data", REPO, "has no README.md"),
        ("backbone", "some body/birds", "cannot be a name on the hub"),
    ],
)
def test_what_is_no_export_or_no_name_is_refused(
    folder: str, repo: str, message: str, hub: Hub, runs, push
) -> None:
    status, printed = push(getattr(runs, folder), hub.url, repo)
    assert status == 2 and message in one_line(printed)
    assert not hub.created
