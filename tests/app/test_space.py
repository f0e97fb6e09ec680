"""The page as a space of the hub: the folder ``space/`` copied, behind TLS as the hub serves it, in a real browser."""

from __future__ import annotations

import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

import pytest

from mergekit_lite.commands.app.places import Places
from mergekit_lite.commands.app.public import (
    MOST_READ,
    MOST_TEXT,
    OUTPUT,
    SECONDS_KEPT,
    PublicPlaces,
    check,
    checked,
    downloads,
    make_room,
    public_runs,
)  # fmt: skip
from mergekit_lite.commands.app.runs import FOLDER, Runs
from mergekit_lite.errors import UsageError
from tests.app.test_page import PROGRAM, Server, at, fill_in, weights, write
from tests.app.test_parts import answer
from tests.browser import chromium
from tests.checkpoint.hub_server import Hub, Repository, _Handler, running
from tests.models import state, tuned, write_folder

SPACE = Path(__file__).parents[2] / "space"
HOST = "owner-name.hf.space"
TOKEN = "hf_MARKEDtokenMARKEDtokenMARKEDtoken"
RECIPE = """\
merge_method: ties
base_model: org/base
models:
  - model: org/math
    parameters: {weight: 0.5, density: 0.5}
  - model: org/code
    parameters: {weight: 0.5, density: [0.3, 0.7]}
"""


@pytest.fixture
def places(tmp_path: Path) -> Places:
    root = tmp_path / "root"
    (root / OUTPUT).mkdir(parents=True)
    (root / FOLDER).mkdir(mode=0o700)
    return PublicPlaces(root, root)


@pytest.mark.parametrize(
    "reference",
    [
        "./merged", "merged", "../root", "/etc", "~/model", ".", FOLDER, "base", "org/base+merged:0.5",
        "org/base+/etc/passwd", "hf=merged:org/base", "hf://org/base", "https://169.254.169.254/latest",
        "s3://bucket/name", "org/base+https://host/a.safetensors", "file:///etc/passwd", "part=model:./merged",
        "org/name/deeper", "org/model.safetensors", "-o/name",
    ],
)  # fmt: skip
def test_only_the_hub_is_read(places: Places, reference: str) -> None:
    problems = checked(RECIPE.replace("org/math", f'"{reference}"'), places).problems
    assert [line for line, _ in problems] == [4], problems
    assert str(places.root) not in problems[0][1]


@pytest.mark.parametrize("reference", ["org/math@main", "org/math@refs/pr/1", "org/base+org/adapter:0.5"])
def test_names_of_the_hub_pass(places: Places, reference: str) -> None:
    assert not checked(RECIPE.replace("org/math", reference), places).problems


@pytest.mark.parametrize("key", ["run", "statistics", "tokenizer_source"])
def test_no_other_key_reads_what_is_here(places: Places, key: str) -> None:
    text = RECIPE.replace("  - model: org/math\n", f"  - model: org/math\n    {key}: ./merged\n")
    assert any(line == 5 and "of the hub alone" in said for line, said in checked(text, places).problems)


def test_texts_are_bounded(places: Places) -> None:
    ((_, said),) = checked(RECIPE + "#" * MOST_TEXT, places).problems
    assert f"takes {MOST_TEXT:,}" in said
    ((line, said),) = checked(f"{RECIPE}---\n{RECIPE}", places).problems
    assert line is not None and "one document" in said


def test_runs_are_bounded() -> None:
    check(MOST_READ)
    with pytest.raises(UsageError, match="reads up to 20"):
        check(MOST_READ + 1)


def test_an_output_stays_a_while_and_goes_with_the_next_run(places: Places) -> None:
    runs = public_runs(places.root)
    made = places.root / OUTPUT
    (made / "model.safetensors").write_bytes(b"12")
    (places.root / FOLDER / "run.json").write_text(
        '{"arguments": ["merge"], "output": "merged", "outputs": ["merged"], "process": 1}'
    )
    (made / "link").symlink_to("/etc/passwd")
    assert downloads(runs) == {"model.safetensors": 2}
    with pytest.raises(UsageError, match="stays for 10 minutes"):
        make_room(runs)
    long_ago = time.time() - SECONDS_KEPT - 1
    os.utime(made, (long_ago, long_ago))
    make_room(runs)
    assert not made.exists() and downloads(runs) == {}


def test_a_run_ends_when_its_time_is_over(tmp_path: Path) -> None:
    """The process waits for a pipe that nobody writes to."""
    os.mkfifo(tmp_path / "recipe.yml")
    runs = Runs(tmp_path, seconds=0.1)
    runs.launch(["plan", "recipe.yml"], "merged")
    runs._follower.join()
    assert runs.state().kind == "failed"


def test_a_space_answers_its_own_page() -> None:
    own = {"origin": f"https://{HOST}", "sec_fetch_site": "same-origin"}
    for host in (HOST, "10.0.0.1:7860"):  # what the hub's proxy calls it, and who looks whether it lives
        assert answer("/gradio_api/queue/join", space=(HOST,), host=host, **own) == 200
    assert answer("/", space=(HOST,), host=HOST, sec_fetch_site="cross-site") == 200  # in the hub's frame


@pytest.mark.parametrize("origin", ["https://evil.hf.space", f"http://{HOST}", "https://huggingface.co", "null"])
def test_a_space_answers_no_other_page(origin: str) -> None:
    assert answer("/gradio_api/queue/join", space=(HOST,), host=HOST, origin=origin) == 403
    assert answer("/config", space=(HOST,), host=HOST, sec_fetch_site="cross-site") == 403
    assert answer("/gradio_api/file=/etc/passwd", space=(HOST,), host=HOST) == 404


def test_the_folder_asks_for_what_the_package_asks_for() -> None:
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    project = tomllib.loads((SPACE.parent / "pyproject.toml").read_text())["project"]
    wanted = {*project["dependencies"], *project["optional-dependencies"]["app"]}
    written = (SPACE / "requirements.txt").read_text().splitlines()
    assert {line for line in written if not line.startswith("#")} == wanted
    pinned = (SPACE.parent / "constraints.txt").read_text().splitlines()
    version = next(line.removeprefix("gradio==") for line in pinned if line.startswith("gradio=="))
    assert f"sdk_version: {version}\n" in (SPACE / "README.md").read_text()


class _Listening(_Handler):
    """A hub that keeps what it was told of who asks."""

    tokens: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        self.tokens.append(self.headers.get("Authorization"))
        super().do_GET()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    base = state(0)
    made = {"org/base": base, "org/math": tuned(base, 1), "org/code": tuned(base, 2)}
    repositories = {}
    for name, tensors in made.items():
        folder = write_folder(tmp_path_factory.mktemp("hub") / name, tensors)
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        repositories[name] = Repository({"main": "a" * 40}, {"a" * 40: files})
    with running(Hub(repositories), _Listening) as hub:
        yield hub


@contextmanager
def tls(port: int, folder: Path) -> Iterator[int]:
    """Let a port speak TLS for another one, as the hub's proxy does."""
    if (openssl := shutil.which("openssl")) is None:
        pytest.skip("needs openssl")
    made = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={HOST}", "-days", "2"]
    subprocess.run([*made, "-keyout", folder / "key", "-out", folder / "cert"], check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "cert", folder / "key")
    listening = socket.create_server(("127.0.0.1", 0))

    def relay(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError, ValueError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def serve(accepted: socket.socket) -> None:
        with (
            suppress(OSError),
            context.wrap_socket(accepted, server_side=True) as near,
            socket.create_connection(("127.0.0.1", port)) as far,
        ):
            back = threading.Thread(target=relay, args=(far, near))
            back.start()
            relay(near, far)
            back.join()

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listening.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listening.getsockname()[1]
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()


@contextmanager
def space(hub: Hub, folder: Path) -> Iterator[tuple[Server, Path]]:
    """The folder ``space/`` copied, and its ``app.py`` run as on the hub, with its owner's token."""
    copied = Path(shutil.copytree(SPACE, folder / "space"))
    environment = {"SPACE_HOST": HOST, "SPACE_ID": "owner/name", "SYSTEM": "spaces", "HF_TOKEN": TOKEN}
    here = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "NO_PROXY": "127.0.0.1", "TMPDIR": str(folder)}
    (folder / "home").mkdir()
    (folder / "home" / "token").write_text(TOKEN)
    server = Server(copied, (str(copied / "app.py"),), **environment, **here)
    try:
        yield server, copied / "outputs"
    finally:
        server.kill()


def test_from_a_name_of_the_hub_to_a_download(hub: Hub, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    expect = playwright.expect
    with (
        space(hub, tmp_path) as (server, root),
        tls(server.port, tmp_path) as port,
        playwright.sync_playwright() as engine,
    ):
        flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        flags += [f"--host-resolver-rules=MAP {HOST}:443 127.0.0.1:{port}"]
        browser = engine.chromium.launch(executable_path=chromium(), args=flags)
        server.address = f"https://{HOST}/"
        proxied: dict[str, Any] = {"ignore_https_errors": True, "extra_http_headers": {"x-forwarded-proto": "https"}}
        with at(browser, server, **proxied) as page, at(browser, server, **proxied) as other:
            assert page.get_by_role("tab").all_inner_texts() == ["Models", "Recipe", "Run"]
            made = re.findall(
                r'"elem_id": ?"([\w-]+)"', page.evaluate("fetch('/config').then(answer => answer.text())")
            )
            assert "predict" in made  # and nothing to push, to download into the cache, or to choose by
            assert not [each for each in made if each.startswith(("hub", "push", "choose", "chat", "stream", "resume"))]
            fill_in(page.locator("#models textarea, #models input"), "org/base org/math")
            page.locator("#inspect").click()
            expect(page.locator("#told")).to_contain_text("mergekit-lite inspect org/math --stream")
            page.locator("#compare").click()
            expect(page.frame_locator("#told iframe").locator("h1")).to_contain_text("What the models changed")
            write(page, RECIPE.replace("org/math", "./outputs"))
            expect(page.locator("#plan li")).to_contain_text(
                "line 4: './outputs' is not the name of a model on the hub"
            )
            write(page, RECIPE.replace("org/math", "org/maht"))
            expect(page.locator("#plan")).to_contain_text("Nothing is wrong in the text itself")
            page.locator("#predict").click()
            expect(page.locator("#time")).to_contain_text("the hub has no such model")
            write(page, RECIPE)
            page.locator("#predict").click()
            expect(page.locator("#time")).to_contain_text("density 0.5 / 0.3 … 0.7")
            page.get_by_role("tab", name="Run").click()
            page.locator("#run").click()
            expect(page.locator("#state")).to_contain_text("--stream")
            with page.expect_download() as told:
                page.get_by_role("link", name="model.safetensors").click()
            downloaded = told.value.path().read_bytes()
            write(other, RECIPE)
            other.get_by_role("tab", name="Run").click()
            expect(other.locator("#state .done")).to_be_visible()
            other.locator("#run").click()
            expect(other.locator("#refused")).to_contain_text("stays for")
            asked = "fetch('/output/..%2f..%2fapp.py').then(answer => answer.status)"
            assert page.evaluate(asked) == 404
        browser.close()
    as_typed = [sys.executable, "-c", PROGRAM, "merge", "recipe.yml", "-o", "typed", "--stream"]
    (tmp_path / "recipe.yml").write_text(RECIPE)
    subprocess.run(as_typed, cwd=tmp_path, env=os.environ | {"HF_ENDPOINT": hub.url}, check=True, capture_output=True)
    assert weights(root / OUTPUT) == weights(tmp_path / "typed") == {"model.safetensors": downloaded}
    assert hub.asked and set(_Listening.tokens) == {None}, "the owner's token was sent"
