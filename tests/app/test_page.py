"""The page in a real browser, served by the real command."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from mergekit_lite.commands import main
from tests.browser import chromium
from tests.models import state, tuned, write_folder
from tests.ports import free_port
from tests.processes import wait_for_spans

if not os.environ.get("CI"):
    if find_spec("gradio") is None:  # not imported here: that takes seconds, and the servers do it
        pytest.skip("needs gradio", allow_module_level=True)
    pytest.importorskip("playwright")
from playwright.sync_api import Locator, Page, expect, sync_playwright

WAIT = 120_000  # milliseconds, for a machine that is busy
WRONG = """\
merge_method: ties
base_model: ./base
models:
  - model: ./math
    parameters: {weigth: 0.5, density: 0.5}
  - model: ./code
    parameters: {weight: 0.5, density: [0.3, 0.7]}
"""
RIGHT = WRONG.replace("weigth", "weight")
HOSTILE = "model.layers.0.<img src=x onerror=document.title='hit'>${1+1}{{value}}.weight"
# Of a text to what is behind it, as WCAG 2 reckons it.
CONTRAST = """element => {
    const parts = colour => colour.match(/[\\d.]+/g).map(Number);
    let behind = element;
    while (parts(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
    const light = colour => {
        const even = x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4;
        const [r, g, b] = parts(colour).map(x => even(x / 255));
        return .2126 * r + .7152 * g + .0722 * b + .05;
    };
    const both = [light(getComputedStyle(element).color), light(getComputedStyle(behind).backgroundColor)];
    return Math.max(...both) / Math.min(...both);
}"""
PROGRAM = "from mergekit_lite.commands import start; start()"


class Server:
    """The command ``app`` in a process."""

    def __init__(self, root: Path, program: Sequence[str] = (), **environment: str) -> None:
        self.port = free_port()
        command = program or ("-c", PROGRAM, "app", "--root", str(root))
        self.address = f"http://127.0.0.1:{self.port}/"
        self.process = subprocess.Popen(
            [sys.executable, *command, "--port", str(self.port)],
            env=os.environ | environment, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None and self.process.stdout.readline().startswith("http://")
        until = time.monotonic() + WAIT / 1000
        while True:
            try:
                urllib.request.urlopen(self.address, timeout=WAIT / 1000).close()
                return
            except OSError:
                assert time.monotonic() < until and self.process.poll() is None
                time.sleep(0.1)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextmanager
def serving(root: Path, program: Sequence[str] = ()) -> Iterator[Server]:
    server = Server(root, program)
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root")
    base = state(0, layers=43, hidden=16)
    write_folder(root / "base", base)
    write_folder(root / "math", tuned(base, 1))
    write_folder(root / "code", tuned(base, 2))
    write_folder(root / "hostile", base | {HOSTILE: torch.ones(16, dtype=torch.bfloat16)})
    return root


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Server]:
    with serving(root) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = chromium()
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=program, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Page]:
    with at(browser, server) as page:
        yield page


@contextmanager
def at(browser: Any, server: Server, **options: Any) -> Iterator[Page]:
    """The page in a window; it asks nobody but its server, and no script of it fails."""
    with browser.new_context(**options) as context:
        page = context.new_page()
        page.set_default_timeout(WAIT)
        expect.set_options(timeout=WAIT)
        asked: list[str] = []
        failed: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: failed.append(str(error)))
        page.goto(server.address)
        page.get_by_role("tab", name="Models").wait_for()
        yield page
        elsewhere = [url for url in asked if not url.startswith((server.address, "data:", "blob:", "about:"))]
        assert not elsewhere and not failed, (elsewhere, failed)


def wait(known: Callable[[], bool]) -> None:
    until = time.monotonic() + WAIT / 1000
    while not known():
        assert time.monotonic() < until
        time.sleep(0.05)


def until_seen(act: Callable[[], object], seen: Callable[[float], object]) -> None:
    """Act, and once more where it is lost: while Gradio draws a part again, its fields and keys may take nothing.

    ``seen`` expects what follows, for some milliseconds. What is done must do no harm if it is done twice.
    """
    for patience in (WAIT / 8, WAIT / 4):
        with suppress(AssertionError):
            act()
            seen(patience)
            return
    act()
    seen(WAIT)


def fill_in(box: Locator, text: str) -> None:
    until_seen(lambda: box.fill(text), lambda patience: expect(box).to_have_value(text, timeout=patience))


def write(page: Page, text: str) -> None:
    page.get_by_role("tab", name="Recipe").click()
    editor = page.locator("#recipe .cm-content")
    # An editor that is being drawn loses the selection, and what is written comes before what was there.
    until_seen(
        lambda: editor.fill(text),
        lambda patience: expect(editor).to_have_text(text, use_inner_text=True, timeout=patience),
    )


def run(page: Page, output: str) -> None:
    page.get_by_role("tab", name="Run").click()
    fill_in(page.locator("#output textarea, #output input"), output)
    page.locator("#run").click()


def command(root: Path, *arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        ended = CliRunner().invoke(main, arguments)
    assert ended.exit_code == 0, ended.output


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def test_from_a_wrong_recipe_to_the_commands_bytes(page: Page, root: Path) -> None:
    write(page, WRONG)
    problem = page.locator("#plan li")
    expect(problem).to_contain_text("line 5: ties takes no parameter 'weigth'. Did you mean 'weight'?")
    write(page, RIGHT)
    expect(page.locator("#plan .plan")).to_contain_text("density 0.5 / 0.3 … 0.7")
    run(page, "of-page")
    expect(page.locator("#state .done")).to_contain_text(
        "mergekit-lite merge .mergekit-lite-app/of-page.yml -o of-page"
    )
    command(root, "merge", ".mergekit-lite-app/of-page.yml", "-o", "of-command")
    assert (root / ".mergekit-lite-app" / "of-page.yml").read_text() == RIGHT
    assert weights(root / "of-page") == weights(root / "of-command") != {}
    page.locator("#verify").click()
    expect(page.locator("#verdict")).to_contain_text("of-page is sound")
    page.locator("#run").click()
    expect(page.locator("#refused")).to_contain_text("exists")
    page.reload()
    page.get_by_role("tab", name="Recipe").click()
    page.locator("#template input").click()
    page.get_by_role("option", name="the latest run's").click()
    expect(page.locator("#plan .plan")).to_contain_text("density 0.5 / 0.3 … 0.7")
    page.get_by_role("tab", name="Models").click()
    page.locator("#refresh").click()
    page.locator("#models input").click()
    expect(page.get_by_role("option", name="./of-page")).to_be_visible()


def test_a_slider_and_the_text_are_one_state(page: Page) -> None:
    """By keyboard: an arrow moves the number in the text, and what is written moves the slider."""
    write(page, RIGHT)
    slider = page.get_by_role("slider").first
    expect(slider).to_have_value("0.5")
    slider.focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#recipe .cm-content")).to_contain_text("{weight: 0.51, density: 0.5}")
    expect(page.locator("#plan .plan")).to_contain_text("weight 0.51 / 0.5")
    write(page, RIGHT.replace("{weight: 0.5, density: 0.5}", "{weight: 0.25, density: 0.5}"))
    expect(slider).to_have_value("0.25")


def test_a_path_out_of_the_root_and_a_hostile_name(page: Page, tmp_path: Path) -> None:
    write(page, RIGHT.replace("./math", str(tmp_path)))
    expect(page.locator("#plan li")).to_contain_text("leads out of")
    write(page, "merge_method: passthrough\nmodels: [{model: ./hostile}]\nexclude: ['img src']\n")
    expect(page.locator("#plan .plan")).to_contain_text(HOSTILE)
    assert page.title() == "mergekit-lite" and not page.locator("#plan img").count()


def test_models_are_compared(page: Page) -> None:
    for name in ("./base", "./math"):
        page.locator("#models input").click()
        page.get_by_role("option", name=name).click()
    page.keyboard.press("Escape")
    page.locator("#inspect").click()
    expect(page.locator("#told")).to_contain_text("mergekit-lite inspect ./math")
    page.locator("#compare").click()
    expect(page.frame_locator("#told iframe").locator("h1")).to_contain_text("What the models changed")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_narrow_window(browser: Any, server: Server, scheme: str) -> None:
    with at(browser, server, viewport={"width": 400, "height": 800}, color_scheme=scheme) as page:
        write(page, RIGHT)
        expect(page.locator("#plan .plan")).to_contain_text("ties")
        for name in ("Models", "Recipe", "Run"):
            page.get_by_role("tab", name=name).click()
            assert page.evaluate("document.documentElement.scrollWidth") <= 400, name
            texts = ".info-text, button.lg:enabled, #plan p, [role=tab], .min_value, .cm-gutterElement"
            for text in page.locator(texts).locator("visible=true").all():
                assert text.evaluate(CONTRAST) >= 4.5, (name, text.inner_text())  # WCAG 2, 1.4.3
        light = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert light == (scheme == "light")


@pytest.mark.slow
def test_stop_and_resume(browser: Any, root: Path) -> None:
    """A run is stopped and resumed; resumed once more, and killed with its server; the next server resumes it."""
    base = {f"model.layers.{n}.mlp.up_proj.weight": torch.randn(1024, 1024).bfloat16() for n in range(60)}
    write_folder(root / "large", base)
    write_folder(root / "tuned", tuned(base, 1))
    recipe = "merge_method: dare_linear\nbase_model: ./large\nmodels:\n  - model: ./tuned\n"
    recipe += "    parameters: {weight: 0.5, density: 0.5}\n"
    with serving(root) as server, at(browser, server) as page:
        write(page, recipe)
        expect(page.locator("#plan .plan")).to_contain_text("dare_linear")
        run(page, "stopped")
        group = halted(root, 2)
        page.locator("#stop").click()
        wait(lambda: interrupted(group))
        os.killpg(group, signal.SIGCONT)
        expect(page.locator("#state .stopped")).to_contain_text("Interrupted")
        page.locator("#resume").click()
        group = halted(root, 10)
        server.kill()
        os.killpg(group, signal.SIGKILL)
    with serving(root) as server, at(browser, server) as page:
        page.get_by_role("tab", name="Run").click()
        expect(page.locator("#state .stopped")).to_contain_text("stopped")
        page.locator("#resume").click()
        expect(page.locator("#state .done")).to_contain_text("--resume")
    command(root, "merge", ".mergekit-lite-app/stopped.yml", "-o", "at-once")
    assert weights(root / "stopped") == weights(root / "at-once") != {}


def halted(root: Path, spans: int) -> int:
    """Halt the run when it has journalled some spans; return its group of processes."""
    wait_for_spans(root, "stopped", spans)
    group = json.loads((root / ".mergekit-lite-app" / "run.json").read_text())["process"]
    os.killpg(group, signal.SIGSTOP)
    assert not (root / "stopped").exists()
    return int(group)


def interrupted(process: int) -> bool:
    """Whether a halted process will find an interrupt when it goes on."""
    pending = re.search(r"^ShdPnd:\s+(\w+)", Path(f"/proc/{process}/status").read_text(), re.M)
    return pending is not None and bool(int(pending[1], 16) & 1 << signal.SIGINT - 1)


@pytest.mark.parametrize("path", ["/etc/hostname", "http://127.0.0.1:9/file"])
def test_a_request_names_no_file(server: Server, path: str) -> None:
    """Gradio would copy what a request names, or fetch it, before any function of the page is called."""
    with urllib.request.urlopen(f"{server.address}config") as answer:
        events = json.load(answer)["dependencies"]
    event = next(each["id"] for each in events if each["inputs"])
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    for number, data in enumerate((file, [file], {"value": [file]})):
        session = f"session-{path[-4:]}-{number}"
        asked = json.dumps({"data": [data], "fn_index": event, "session_hash": session}).encode()
        join = f"{server.address}gradio_api/queue/join"
        urllib.request.urlopen(urllib.request.Request(join, asked, {"Content-Type": "application/json"})).close()
        with urllib.request.urlopen(f"{server.address}gradio_api/queue/data?session_hash={session}") as told:
            (last,) = (line for line in told if b"process_completed" in line)
        assert b"takes no files" in last


def test_by_keyboard_alone(page: Page, root: Path) -> None:
    """A recipe is written and run; nothing is clicked, and the editor doesn't keep the focus."""

    def is_at(to: str) -> bool:
        return bool(page.evaluate("wanted => document.activeElement.closest(wanted) !== null", to))

    def go(to: str, key: str = "Tab") -> None:
        for _ in range(60):
            page.keyboard.press(key)
            if is_at(to):
                page.wait_for_timeout(300)  # a part that is drawn again meanwhile may take the focus back
                if is_at(to):
                    return
        raise AssertionError(f"{key} never leads to {to}")

    def press(to: str, key: str = "Tab") -> None:
        go(to, key)
        page.keyboard.press("Enter")

    def write_anew(to: str, text: str) -> None:
        go(to)
        expect(page.locator("#template [role=listbox]")).to_be_hidden()  # it was passed by
        page.keyboard.press("Control+A")
        page.keyboard.insert_text(text)

    def leave_the_editor() -> None:
        page.keyboard.press("Escape")
        press(tab.format(3), "Shift+Tab")

    tab = "[role=tab]:nth-of-type({})"
    drawn = expect(page.locator("#plan :is(.plan, .problems)"))
    until_seen(lambda: press(tab.format(2)), lambda patience: drawn.to_be_visible(timeout=patience))
    plan = expect(page.locator("#plan .plan"))
    until_seen(
        lambda: write_anew("#recipe .cm-content", RIGHT),
        lambda patience: plan.to_contain_text("ties", timeout=patience),
    )
    name = expect(page.locator("#output textarea, #output input"))
    until_seen(leave_the_editor, lambda patience: name.to_be_visible(timeout=patience))
    until_seen(
        lambda: write_anew("#output", "by-keyboard"),
        lambda patience: name.to_have_value("by-keyboard", timeout=patience),
    )
    state = expect(page.locator("#state :is(.running, .done)"))
    until_seen(lambda: press("#run"), lambda patience: state.to_contain_text("by-keyboard", timeout=patience))
    expect(page.locator("#state .done")).to_contain_text("by-keyboard")
    assert weights(root / "by-keyboard")
