"""What the studio serves, to whom, and what it refuses: over HTTP, without a browser."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from spf_kit.errors import UserError
from spf_kit.studio import app as application
from spf_kit.studio.folders import Folders
from spf_kit.studio.state import Studio

pytest.importorskip("gradio", reason="gradio is not installed: pip install -e '.[dev]'")
Get = Callable[..., http.client.HTTPResponse]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is the studio's, beside a secret."""
    outside = tmp_path_factory.mktemp("outside")
    (outside / "secret.txt").write_text("SECRET")
    made = outside / "inside"
    (made / "runs").mkdir(parents=True)
    (made / "own.txt").write_text("SECRET")
    (made / "link.txt").symlink_to(outside / "secret.txt")
    return made


@pytest.fixture(scope="module", params=[None, "open sesame"], ids=["open", "password"])
def studio(
    request: pytest.FixtureRequest, folder: Path, tmp_path_factory
) -> Iterator[tuple[int, str | None]]:
    """Port and password of a studio."""
    application._settle(str(tmp_path_factory.mktemp("scratch")))
    made = Studio(Folders([folder]), folder / "runs")
    blocks, port = application.blocks(made), free_port()
    application._launch(blocks, made, "127.0.0.1", port, request.param)
    yield port, request.param
    blocks.close()


def ask(
    port: int, path: str, method: str = "GET", body: str = "", **headers: str
) -> tuple[int, str, http.client.HTTPMessage]:
    """Send a path as it is written, which a browser or a library would tidy up."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        connection.putheader(name, value)
    connection.endheaders(body.encode())
    answer = connection.getresponse()
    return answer.status, answer.read().decode(errors="replace"), answer.headers


def signed_in(port: int, password: str) -> str:
    form = urllib.parse.urlencode({"username": "anybody", "password": password})
    status, _, headers = ask(
        port, "/login", "POST", form, **{"Content-Type": "application/x-www-form-urlencoded"}
    )
    assert status == 200
    return "; ".join(cookie.split(";")[0] for cookie in headers.get_all("Set-Cookie") or [])


ROUTES = ["/gradio_api/file=", "/file=", "/gradio_api/file/", "/static/", "/assets/"]
PATHS = [
    "/etc/passwd",
    "../../../../../../etc/passwd",
    "{0}/../secret.txt",
    "{0}/%2e%2e/secret.txt",
    "{0}/runs/../../secret.txt",
    "{0}/link.txt",
    "{0}/own.txt",
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("route", ROUTES)
def test_no_file_has_an_address(studio: tuple[int, str | None], folder: Path, route: str, path: str) -> None:
    port, password = studio
    headers = {"Cookie": signed_in(port, password)} if password else {}
    status, text, _ = ask(port, route + path.format(folder), **headers)
    assert status >= 400
    assert "SECRET" not in text
    assert "root:" not in text


def test_a_page_is_served_to_who_may_have_it(studio: tuple[int, str | None]) -> None:
    port, password = studio
    if password:
        assert ask(port, "/config")[0] == 401
        assert ask(port, "/report?run=x")[0] == 401
        form = "username=a&password=wrong"
        kind = {"Content-Type": "application/x-www-form-urlencoded"}
        assert ask(port, "/login", "POST", form, **kind)[0] == 400
    headers = {"Cookie": signed_in(port, password)} if password else {}
    status, text, _ = ask(port, "/config", **headers)
    assert status == 200
    labels = {part["props"].get("label") for part in json.loads(text)["components"]}
    assert {"Data", "Train", "Runs", "Try", "Merge and share"} <= labels


def test_pages_of_other_sites_are_refused(studio: tuple[int, str | None]) -> None:
    port, password = studio
    if password:
        pytest.skip("they lack the password")
    for headers in (
        {"Host": "evil.example"},
        {"Host": f"evil.example:{port}"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": f"http://127.0.0.1:{port + 1}"},
    ):
        assert ask(port, "/config", **headers)[0] == 403
    assert ask(port, "/config", Origin=f"http://127.0.0.1:{port}")[0] == 200
    assert ask(port, "/config", Host=f"localhost:{port}")[0] == 200


def serve(folder: Path, **options) -> None:
    defaults = {"runs": folder / "runs", "host": "127.0.0.1", "port": 1, "password": None, "say": print}
    application.serve([folder], **{**defaults, **options})


def test_others_are_let_in_only_with_a_password(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(application.PASSWORD, raising=False)
    with pytest.raises(UserError, match=r"--host 0\.0\.0\.0 lets other machines in: give a --password"):
        serve(folder, host="0.0.0.0")


def test_without_gradio_it_says_how_to_install_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"the studio needs gradio: pip install 'spf-kit\[ui\]'"):
        serve(folder)


def test_a_port_that_is_taken(folder: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port} is taken: choose another"):
            serve(folder, port=port)


def test_pages_are_laid_out_without_torch(folder: Path, tmp_path: Path) -> None:
    """Which takes longer to import than the studio may take to start."""
    code = f"""
import sys
from pathlib import Path
from spf_kit.studio import app
from spf_kit.studio.folders import Folders
from spf_kit.studio.state import Studio
app._settle({str(tmp_path)!r})
app.blocks(Studio(Folders([Path({str(folder)!r})]), Path({str(folder / "runs")!r})))
print(sorted({{'torch', 'transformers', 'diffusers', 'matplotlib'}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_gradio_writes_no_stubs_beside_its_own_code(tmp_path: Path) -> None:
    """In front of a package that does at its import what gradio does."""
    (tmp_path / "gradio").mkdir()
    (tmp_path / "gradio/__init__.py").write_text("from gradio.component_meta import KEPT, make\nmake()\n")
    (tmp_path / "gradio/component_meta.py").write_text(
        "from pathlib import Path\nKEPT = 7\n\n"
        "def create_or_modify_pyi(*names):\n    Path(__file__).with_suffix('.pyi').touch()\n\n"
        "def make():\n    create_or_modify_pyi(object, 'name', [])\n"
    )
    stub = tmp_path / "gradio/component_meta.pyi"
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {{}}import gradio; print(gradio.KEPT)"
    prepare = "from spf_kit.studio import quick_gradio; quick_gradio.prepare(); "
    for before, written in ((prepare, False), ("", True)):
        done = subprocess.run([sys.executable, "-c", code.format(before)], capture_output=True, text=True)
        assert (done.stdout, done.stderr) == ("7\n", "")
        assert stub.exists() == written
