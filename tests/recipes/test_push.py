"""Pushing to a hub on this machine, that speaks the hub's protocol; the card; what is refused before anything is sent."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from huggingface_hub import constants

from tests.recipes.toys import write_rows
from trivium.recipes import push


class Hub(BaseHTTPRequestHandler):
    """Creates repositories, and takes commits whose files are all inline."""

    repos: dict[str, dict[str, bytes]]
    refuse: int | None

    def do_POST(self):
        body = (
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if "chunked" not in self.headers.get("Transfer-Encoding", "")
            else self._chunks()
        )
        if self.server.refuse:
            return self._answer(self.server.refuse, {"error": "no room for you here"})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.server.repos.setdefault(repo, {})
            self.server.private[repo] = asked.get("private", asked.get("visibility") == "private")
            return self._answer(200, {"url": f"{self.server.address}/{repo}", "name": repo, "id": repo})
        if self.path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            listed = json.loads(body)["files"]
            return self._answer(200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in listed]})
        if "/commit/" in self.path:
            repo = self.path.split("/api/models/")[1].split("/commit/")[0]
            for line in body.splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    self.server.repos[repo][item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            url = f"{self.server.address}/{repo}/commit/abc"
            return self._answer(200, {"commitUrl": url, "commitOid": "abc", "success": True})
        return self._answer(404, {"error": self.path})

    def do_GET(self):
        self._answer(200, {"type": "user", "name": "me", "sha": "abc", "id": "x", "siblings": []})

    do_HEAD = do_GET

    def _chunks(self):
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        return data

    def _answer(self, status, value):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_args):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repos, server.private, server.refuse = {}, {}, None
    server.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", server.address)  # what HF_ENDPOINT sets when a process starts
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield server
    server.shutdown()


@pytest.fixture
def mine(toy, tmp_path):
    shutil.copytree(toy, tmp_path / "mine")
    return tmp_path / "mine"


def test_a_model_arrives_whole_with_its_card(trivium, hub, mine):
    write_rows(mine.parent / "rows.jsonl", "test", count=3)
    trivium.ok(
        "eval",
        "run",
        "--model",
        mine,
        "--task.kind",
        "generate",
        "--task.scorer",
        "json",
        "--task.data",
        "rows.jsonl",
        "--out",
        "r.json",
        "--task.sampling.max_tokens",
        "4",
    )
    (mine / "optimizer.bin").write_bytes(b"never sent")
    done = trivium.ok("push", mine, "me/contacts", "--results", "r.json", "--license", "apache-2.0", "--json")
    assert "hf_secret" not in done.out + done.err
    there = hub.repos["me/contacts"]
    assert hub.private["me/contacts"] is True and "optimizer.bin" not in there
    for name in ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "trivium.json", "README.md"):
        assert there[name] == (mine / name).read_bytes(), name
    card = there["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "apache-2.0" and front["model-index"][0]["results"][0]["metrics"][0]["type"] == "exact_match"
    sums = json.loads((mine / "trivium.json").read_text())["files"]
    assert sums["model.safetensors"]["sha256"] in card and "| generate | rows.jsonl | exact_match |" in card


def test_what_someone_wrote_stays(mine):
    push.write_card(mine)
    card = mine / "README.md"
    card.write_text(card.read_text().replace("# mine", "# mine\n\nMade with care.") + "\nAsk me.\n")
    push.write_card(mine)
    text = card.read_text()
    assert "Made with care." in text and text.endswith("Ask me.\n") and text.count(push.BEGIN) == 1
    card.write_text("A card of my own.\n")
    push.write_card(mine)
    assert card.read_text().startswith("A card of my own.\n\n" + push.BEGIN)


def test_a_dry_run_sends_nothing(trivium, hub, mine):
    listed = trivium.ok("push", mine, "me/x", "--dry-run").out
    assert "model.safetensors" in listed and hub.repos == {}


def test_what_is_refused(trivium, hub, mine, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no model" in trivium.refused("push", tmp_path / "empty", "me/x")
    hub.refuse = 403
    assert "the hub did not take it" in trivium.refused("push", mine, "me/x")
    config = json.loads((mine / "config.json").read_text())
    (mine / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert "config.json" in trivium.refused("push", mine, "me/x")
    assert hub.repos == {}
