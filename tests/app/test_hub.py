"""The page and the hub, in a real browser beside a hub on this machine: push, download, read by range; no token."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.app.test_page import Server, at, browser, command, fill_in, run, serving, wait, weights, write
from tests.checkpoint.hub_server import Repository
from tests.models import state, tree_bytes, tuned, write_folder
from tests.remote.push_hub import TOKEN, PushHub
from tests.remote.push_hub import serving as serving_hub

if not os.environ.get("CI"):
    pytest.importorskip("playwright")
from playwright.sync_api import Page, expect

__all__ = ["browser"]  # a fixture
COMMIT = "c" * 40
FOLDER = ".mergekit-lite-app"
RECIPE = """\
merge_method: linear
models:
  - {model: ./base, parameters: {weight: 0.5}}
  - {model: org/tuned, parameters: {weight: 0.5}}
"""
TWO = """\
name: stem
merge_method: linear
models:
  - {model: ./base, parameters: {weight: 0.5}}
  - {model: ./math, parameters: {weight: 0.5}}
---
merge_method: slerp
base_model: ./base
models: [{model: stem}]
parameters:
  t: [0, 0.5, 1]
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[PushHub]:
    with serving_hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def root(hub: PushHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A root with two models; the hub has a third one; the user is logged in by a token."""
    root = tmp_path_factory.mktemp("root")
    base = state(0, layers=3)
    write_folder(root / "base", base)
    write_folder(root / "math", tuned(base, 1))
    write_folder(root / "tuned", tuned(base, 2), shards=2)
    files = {**tree_bytes(root / "tuned"), "pytorch_model.bin": b"other weights", "picture.png": b"nothing of a model"}
    hub.repositories["org/tuned"] = Repository({"main": COMMIT}, {COMMIT: files})
    hub.private["org/tuned"] = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.url)
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setenv("HF_HUB_DISABLE_XET", "1")
        patch.setenv("NO_PROXY", "127.0.0.1")
        for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE"):
            patch.delenv(name, raising=False)
        yield root


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Server]:
    with serving(root) as server:
        yield server


@pytest.fixture
def page(browser: Any, server: Server, root: Path) -> Iterator[Page]:
    """The page; the token is in no answer of its server, and in no file that the page keeps."""
    with at(browser, server) as page:
        bodies: list[bytes] = []
        page.on("response", lambda response: bodies.append(body(response)))
        yield page
        assert TOKEN not in page.content()
        assert not any(TOKEN.encode() in each for each in bodies)
    kept = [path for path in (root / ".mergekit-lite-app").rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in path.read_bytes() for path in kept)


def body(response: Any) -> bytes:
    try:
        return bytes(response.body())
    except Exception:  # of a stream that goes on, or a redirection
        return b""


def fill(page: Page, name: str, text: str) -> None:
    fill_in(page.locator(f"#{name} textarea, #{name} input"), text)


def opened(page: Page, tab: str, part: str) -> None:
    """A tab with one of its parts unfolded."""
    page.get_by_role("tab", name=tab).click()
    page.locator(f"#{part} button.label-wrap").click()


def asked_of(hub: PushHub, since: int) -> list[str]:
    return [each for each in hub.asked[since:] if "org/tuned" in each]


def test_several_documents_a_curve_and_a_push(page: Page, root: Path, hub: PushHub) -> None:
    write(page, TWO)
    expect(page.locator("#plan .plan")).to_contain_text("Document 'stem'")
    expect(page.locator("#curves svg[role=img]")).to_have_attribute(
        "aria-label", "Gradients over the layers. t, line 11: 0, 0.5, 1"
    )
    expect(page.locator("#time")).to_contain_text("about ")
    slider = page.get_by_label("t, line 11 (2 of 3 along the layers)").last
    slider.focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#curves li")).to_have_text("t, line 11: 0, 0.51, 1")
    run(page, "two")
    expect(page.locator("#state .done")).to_contain_text("mergekit-lite merge .mergekit-lite-app/two.yml -o two")
    command(root, "merge", ".mergekit-lite-app/two.yml", "-o", "of-command")
    assert "t: [0, 0.51, 1]" in (root / ".mergekit-lite-app" / "two.yml").read_text()
    assert weights(root / "two") == weights(root / "of-command") != {}

    page.locator("#push button.label-wrap").click()
    fill(page, "push-repository", "org/two")
    page.locator("#push-check button, button#push-check").click()
    expect(page.locator("#push-state .done")).to_contain_text("mergekit-lite push two org/two --dry-run")
    expect(page.locator("#push-state .done")).to_contain_text("(private)")
    assert "org/two" not in hub.repositories
    push = page.locator("button#push-now")
    fill(page, "push-again", "org/tow")
    push.click()
    expect(page.locator("#push-refused")).to_contain_text("once more")
    assert "org/two" not in hub.repositories
    fill(page, "push-again", "org/two")
    push.click()
    expect(page.locator("#push-state .done pre")).to_contain_text("pushed ")
    found = hub.repositories["org/two"]
    there = {
        name: content for name, content in found.files[found.revisions["main"]].items() if name != ".gitattributes"
    }
    assert there == tree_bytes(root / "two") and hub.private["org/two"] is True

    hub.refused["whoami"] = 401
    fill(page, "push-repository", "org/third")
    page.locator("button#push-check").click()
    expect(page.locator("#push-state .failed")).to_contain_text("hf auth login")
    hub.refused.clear()
    expect(push).to_be_disabled()


def test_a_model_of_the_hub_comes_by_the_users_word_alone(page: Page, root: Path, hub: PushHub) -> None:
    since = len(hub.asked)
    write(page, RECIPE)
    expect(page.locator("#plan li")).to_contain_text("line 4: 'org/tuned' is no folder here")
    assert not asked_of(hub, since)

    page.get_by_role("tab", name="Run").click()  # by range: nothing is stored
    page.locator("#stream input").check()
    page.locator("button#plan-stream").click()
    expect(page.locator("#refused pre")).to_contain_text("by range; nothing of it is stored")
    run(page, "by-range")
    expect(page.locator("#state .done")).to_contain_text("-o by-range --stream")
    cache = Path(os.environ["HF_HOME"], "hub")
    assert not list(cache.glob("models--org--tuned/snapshots/*/*"))

    write(page, RECIPE.replace("org/tuned", "hf://org/tuned"))  # which says that it is
    expect(page.locator("#plan li")).to_contain_text("line 4: 'hf://org/tuned' is read by range")
    page.get_by_role("tab", name="Run").click()
    page.locator("button#plan-stream").click()
    expect(page.locator("#refused pre")).to_contain_text("hf://org/tuned")
    run(page, "by-address")
    expect(page.locator("#state .done")).to_contain_text("-o by-address --stream")
    assert weights(root / "by-address") == weights(root / "by-range")
    assert not list(cache.glob("models--org--tuned/snapshots/*/*"))

    page.get_by_role("tab", name="Models").click()
    page.locator("#models input").click()
    page.get_by_role("option", name="./base").click()
    page.keyboard.press("Escape")
    opened(page, "Models", "hub")
    page.locator("button#hub-compare").click()
    expect(page.frame_locator("#hub-told iframe").locator("h1")).to_contain_text("What the models changed")
    expect(page.locator("#hub-told code")).to_have_text("mergekit-lite compare ./base org/tuned --stream")
    assert not list(cache.glob("models--org--tuned/snapshots/*/*.safetensors"))
    expect(page.locator("#hub-names textarea, #hub-names input")).to_have_value("org/tuned")
    page.locator("button#hub-range").click()
    expect(page.locator("#hub-told")).to_contain_text("mergekit-lite inspect org/tuned --stream")
    page.locator("button#hub-look").click()
    expect(page.locator("#hub-told")).to_contain_text("mergekit-lite inspect org/tuned")
    repository = hub.repositories["org/tuned"].files[COMMIT]
    wanted = {name: len(content) for name, content in repository.items() if not name.endswith((".bin", ".png"))}
    expect(page.locator("#hub-told")).to_contain_text(f"{len(wanted)} files")
    assert not list(cache.glob("models--org--tuned/snapshots/*/*.safetensors"))
    page.locator("button#hub-download").click()
    expect(page.locator("#hub-state .done")).to_contain_text("org/tuned is here")
    (kept,) = cache.glob("models--org--tuned/snapshots/*")
    assert {path.name: path.stat().st_size for path in kept.iterdir()} == wanted

    since = len(hub.asked)
    write(page, RECIPE)
    expect(page.locator("#plan .plan")).to_contain_text("linear weight 0.5")
    page.get_by_role("tab", name="Run").click()
    page.locator("#stream input").uncheck()
    run(page, "of-cache")
    expect(page.locator("#state .done")).to_contain_text("-o of-cache")
    assert not asked_of(hub, since)  # what is kept needs no hub
    local = RECIPE.replace("org/tuned", "./tuned")
    (root / "local.yml").write_text(local)
    command(root, "merge", "local.yml", "-o", "of-folders")
    assert weights(root / "of-cache") == weights(root / "by-range") == weights(root / "of-folders") != {}


def test_what_the_hub_has_not_is_told(page: Page, hub: PushHub) -> None:
    opened(page, "Models", "hub")
    fill(page, "hub-names", "org/nothing")
    page.locator("button#hub-look").click()
    expect(page.locator("#hub-told")).to_contain_text("the hub has no such model")
    expect(page.locator("button#hub-download")).to_be_disabled()
    fill(page, "hub-names", "../secret")
    page.locator("button#hub-look").click()
    expect(page.locator("#hub-told")).to_contain_text("org/name or org/name@revision is expected")
    assert json.dumps(hub.asked).count("secret") == 0


def test_a_download_and_a_push_outlive_their_server(browser: Any, server: Server, root: Path, hub: PushHub) -> None:
    """Each is halted while the hub answers; all tabs of the page show it, those of the next server too.

    The last test of this file: it kills the others' server.
    """
    (root / "local.yml").write_text(RECIPE.replace("org/tuned", "./tuned"))
    command(root, "merge", "local.yml", "-o", "to-push")
    hub.repositories["org/late"] = Repository({"main": COMMIT}, {COMMIT: tree_bytes(root / "math")})
    hub.private["org/late"] = False
    with at(browser, server) as page, at(browser, server) as other:
        opened(page, "Models", "hub")
        fill(page, "hub-names", "org/late")
        page.locator("button#hub-look").click()
        with halted(root, hub, "download", f"GET /org/late/resolve/{COMMIT}/model.safetensors"):
            page.locator("button#hub-download").click()
        opened(page, "Run", "push")
        fill(page, "push-output", "to-push")
        fill(page, "push-repository", "org/kept")
        page.locator("button#push-check").click()
        expect(page.locator("#push-state .done")).to_contain_text("--dry-run")
        fill(page, "push-again", "org/kept")
        with halted(root, hub, "push", "POST /api/models/org/kept/commit/main"):
            page.locator("button#push-now").click()
        opened(other, "Models", "hub")
        opened(other, "Run", "push")
        for each in (page, other):
            expect(each.locator("#push-state .running")).to_have_count(1)
            expect(each.locator("#hub-state .running")).to_have_count(1)
        server.kill()
    with serving(root) as following, at(browser, following) as page:
        opened(page, "Run", "push")
        expect(page.locator("#push-state .running")).to_contain_text("mergekit-lite push to-push org/kept")
        expect(page.locator("button#push-stop")).to_be_enabled()
        fill(page, "push-output", "to-push")
        fill(page, "push-repository", "org/other")
        page.locator("button#push-check").click()
        expect(page.locator("#push-refused")).to_contain_text("A run goes on")
        opened(page, "Models", "hub")
        expect(page.locator("#hub-state .running")).to_contain_text("org/late is on its way")
        expect(page.locator("button#hub-stop")).to_be_enabled()
        for kind in ("push", "download"):
            os.killpg(group(root, kind), signal.SIGCONT)
        expect(page.locator("#hub-state .done")).to_contain_text("org/late is here")
        page.get_by_role("tab", name="Run").click()
        expect(page.locator("#push-state .done")).to_contain_text("pushed ")
    assert hub.private["org/kept"] is True


@contextmanager
def halted(root: Path, hub: PushHub, kind: str, asked: str) -> Iterator[None]:
    """Halt the command that the block starts, in the middle of what it asks of the hub."""
    hub.held[asked] = threading.Event()
    try:
        yield
        wait(lambda: any(each.endswith(asked) for each in hub.asked))
        os.killpg(group(root, kind), signal.SIGSTOP)
    finally:
        hub.held.pop(asked).set()


def group(root: Path, kind: str) -> int:
    return int(json.loads((root / FOLDER / f"{kind}.json").read_text())["process"])
