"""Models by hub id: which files are asked for, against a hub of a few routes on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from spf_kit.embedded import base_path

SHA = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = (".safetensors", ".bin", ".ckpt")
# in a process of its own: the hub's client reads its settings once
OPEN = """
import json, sys
from spf_kit import families
from spf_kit.errors import UserError
told = []
for model in sys.argv[1:]:
    try:
        source = families.open_source(model)
        files = {place.file.name for part in source.configs for place in source.weights(part).values()}
        told.append([source.name, sorted(files)])
    except UserError as error:
        told.append(str(error))
print(json.dumps(told))
"""


class Hub(ThreadingHTTPServer):
    """Folders as models; `asked` are the files that were downloaded, in order."""

    def __init__(self, models: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.models, self.asked = models, list[str]()


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0].strip("/")
        model = next((m for m in self.server.models if f"{m}/" in f"{path}/"), None)
        if model is None:
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        folder = self.server.models[model]
        names = sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())
        if path.startswith(f"api/models/{model}"):
            siblings = [{"rfilename": name} for name in names]
            told: object = {"id": model, "modelId": model, "sha": SHA, "siblings": siblings, "tags": []}
            if f"api/models/{model}/tree" in path:
                told = [self._entry(folder / name, name) for name in names]
            return self._send(200, json.dumps(told).encode(), {"Content-Type": "application/json"}, body)
        name = path.split(f"{model}/resolve/")[1].partition("/")[2]
        if name not in names:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": SHA}, body)
        content = (folder / name).read_bytes()
        if body:
            self.server.asked.append(f"{model}/{name}")
        digest = hashlib.sha256(content).hexdigest()
        self._send(200, content, {"ETag": f'"{digest}"', "X-Repo-Commit": SHA}, body)

    @staticmethod
    def _entry(file: Path, name: str) -> dict[str, object]:
        oid = hashlib.sha256(file.read_bytes()).hexdigest()
        return {"type": "file", "path": name, "size": file.stat().st_size, "oid": oid[:40]}

    def _send(self, code: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


def published(source: Path, target: Path, *, half: bool) -> Path:
    """A model as the hub has them: in full and, with `half`, a variant in half precision, pickles beside."""
    shutil.copytree(source, target)
    for part in ("clip", "judge"):
        shutil.rmtree(target / part, ignore_errors=True)
    index = json.loads((target / "model_index.json").read_text())
    if "text_encoder_2" not in index:  # SDXL has none
        index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
        (target / "model_index.json").write_text(json.dumps(index))
        (target / "safety_checker").mkdir()
        for name in ("config.json", "model.safetensors", "model.fp16.safetensors"):
            (target / "safety_checker" / name).write_text("{}")
    (target / "whole.safetensors").write_bytes(b"a single file, which nobody asked for")
    for file in list(target.glob("*/*.safetensors")):
        if file.parent.name != "safety_checker":
            file.with_suffix(".bin").write_bytes(b"a pickle")
            if half:
                shutil.copy(file, file.with_suffix(".fp16.safetensors"))
    return target


@pytest.fixture(scope="module")
def hub(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    place = tmp_path_factory.mktemp("hub")
    models = {
        "them/small": published(base_path(), place / "small", half=True),
        "them/xl": published(tiny_sdxl, place / "xl", half=True),
        "them/full": published(base_path(), place / "full", half=False),
    }
    server = Hub(models)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def opened(hub: Hub, cache: Path, *models: str, offline: bool = False) -> list[object]:
    """What a process tells of these models, with this hub and an own cache."""
    environment = {
        **os.environ, "HF_HOME": str(cache), "HF_HUB_OFFLINE": str(int(offline)), "HF_HUB_DISABLE_XET": "1",
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", OPEN, *models], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    told: list[object] = json.loads(done.stdout)
    return told


def test_half_precision_is_fetched_where_it_is_published(hub: Hub, tmp_path: Path) -> None:
    """Weights once, as .safetensors: no pickle, no safety checker, no single file. Offline from the cache."""
    models = ("them/small", "them/xl", "them/full", "them/none")
    small, xl, full, none = opened(hub, tmp_path, *models)
    half = ["diffusion_pytorch_model.fp16.safetensors", "model.fp16.safetensors"]
    assert small == ["embedded", half]
    assert xl == ["sdxl", half]
    assert full == ["embedded", [name.replace(".fp16", "") for name in half]]
    assert "'them/none' is neither a path here nor a public model" in str(none)
    weights = sorted(name for name in hub.asked if name.endswith(WEIGHTS))
    parts = {
        "small": ("text_encoder", "unet", "vae"),
        "xl": ("text_encoder", "text_encoder_2", "unet", "vae"),
    }
    assert weights == sorted(
        f"them/{model}/{part}/{'model' if 'text' in part else 'diffusion_pytorch_model'}{variant}.safetensors"
        for model, variant in (("small", ".fp16"), ("xl", ".fp16"), ("full", ""))
        for part in parts.get(model, parts["small"])
    )
    before = list(hub.asked)
    small, xl, full, none = opened(hub, tmp_path, *models, offline=True)
    assert (small, xl, full) == (
        ["embedded", half], ["sdxl", half], ["embedded", [name.replace(".fp16", "") for name in half]],
    )  # fmt: skip
    assert "not in the Hugging Face cache, and the hub cannot be reached" in str(none)
    assert hub.asked == before
