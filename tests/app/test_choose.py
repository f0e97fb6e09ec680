"""Choosing on the page: what it starts and what it refuses, what it shows of a search; a chat; in a browser, too."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from mergekit_lite import preview
from mergekit_lite.boosting import record
from mergekit_lite.boosting.report import write
from mergekit_lite.boosting.search.choice import boost
from mergekit_lite.boosting.search.point import Settings
from mergekit_lite.boosting.search.search import grid
from mergekit_lite.boosting.search.study import Study
from mergekit_lite.commands.app import resident as residing
from mergekit_lite.commands.app import runs as running
from mergekit_lite.commands.app.boosts import BOOST, boost_arguments, data_files
from mergekit_lite.commands.app.chats import PREVIEW, Chat, ask, chat, forget
from mergekit_lite.commands.app.places import Places
from mergekit_lite.commands.app.resident import Resident
from mergekit_lite.commands.app.runs import FOLDER, Runs
from mergekit_lite.commands.app.searched import beside, found, in_part, names_of
from mergekit_lite.errors import UsageError
from mergekit_lite.plain_text import plain
from tests.app.test_page import PROGRAM, Server, at, browser, command, fill_in, serving, until_seen, wait, weights
from tests.boost.end_to_end import write_models, write_pairs, write_prompts
from tests.boost.search.test_choice import peak
from tests.boost.test_report import HOSTILE, Answering
from tests.models import state, tuned, write_folder

if not os.environ.get("CI"):
    if find_spec("gradio") is None:  # not imported here: that takes seconds, and the servers do it
        pytest.skip("needs gradio", allow_module_level=True)
    pytest.importorskip("playwright")
from playwright.sync_api import Page, expect

__all__ = ["browser"]  # a fixture
SLEEPS = (sys.executable, "-c", "import time; print('it sleeps', flush=True); time.sleep(600)")
ANSWERS_LATE = (
    sys.executable,
    "-c",
    "import os, socket, sys, time; _, files, *_ = socket.recv_fds(socket.socket(fileno=int(sys.argv[1])), 65536, 3); "
    "os.write(files[1], b'it sleeps'); time.sleep(600)",
)
QUESTION = "What is <img src=x onerror=document.title='hit'>?"


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    root = tmp_path / "root"
    base = state(0)
    write_folder(root / "sft", base)
    write_folder(root / "dpo", tuned(base, 1))
    write_folder(tmp_path / "secret", tuned(base, 3))
    (root / "dev.jsonl").write_text('{"prompt": "What?"}\n')
    (root / "link.jsonl").symlink_to(tmp_path / "secret" / "config.json")
    (root / "old.boost").mkdir()
    (root / "old.boost" / "items.jsonl").write_text("")
    (root / "run" / "step-1").mkdir(parents=True)
    (root / "run" / "step-2").symlink_to(tmp_path / "secret")
    (root / "out.yml").write_text("merge_method: linear\nmodels: [{model: ../secret, parameters: {weight: 1}}]\n")
    (tmp_path / "cache").mkdir()
    monkeypatch.chdir(root)
    return Places(root, tmp_path / "cache")


FIELDS = {"base": "./sft", "tuned": "./dpo", "data": "dev.jsonl", "score": "maths", "alphas": "", "output": "boosted",
          "more": ""}  # fmt: skip


def test_the_fields_are_the_command(places: Places) -> None:
    made = boost_arguments(places, **FIELDS)
    assert made == ["boost", "./sft", "./dpo", "--prompts", "dev.jsonl", "--score", "maths", "-o", "boosted"]
    fields = FIELDS | {"score": "pairs", "alphas": "0.1,0.2", "more": "--limits 'growth=1.5' --seed 3"}
    made = boost_arguments(places, **fields)
    assert made == [
        "boost", "./sft", "./dpo", "--search", "grid", "--pairs", "dev.jsonl", "--score", "pairs", "--grid", "0.1,0.2",
        "-o", "boosted", "--limits", "growth=1.5", "--seed", "3",
    ]  # fmt: skip
    assert data_files(places) == ["dev.jsonl"]


@pytest.mark.parametrize(
    ("field", "given", "said"),
    [
        ("base", "../secret", "leads out"),
        ("base", "./sfd", "Did you mean './sft'"),
        ("tuned", "https://host/model", "elsewhere"),
        ("data", "../secret/config.json", "leads out"),
        ("data", "link.jsonl", "leads out"),
        ("score", "nll:../secret/config.json", "leads out"),
        ("score", "reward:../secret", "leads out"),
        ("score", "reward:./rn", "there is no model './rn'"),
        ("score", "function:os:system", "left to the command line"),
        ("score", "code,allow_code=true", "left to the command line"),
        ("score", "judge:gpt,server=http://host/v1", "left to the command line"),
        ("score", "lm-eval:task,include=tasks", "left to the command line"),
        ("score", "mahts", "Did you mean 'maths'"),
        ("output", "../out", "a name of letters"),
        ("output", "sft", "exists"),
        ("output", "old", "old.boost exists"),
        ("more", "-o ../out", "leave -o out"),
        ("more", "--study ../out", "--study is left to the command line"),
        ("more", "--storage sqlite:////tmp/x.db", "--storage is left"),
        ("more", "--serve-command 'sh -c reboot'", "--serve-command is left"),
        ("more", "--ray host:6379", "--ray is left"),
        ("more", "--copy-code", "--copy-code is left"),
        ("more", "--force", "--force is left"),
        ("more", "--json", "--json is left"),
        ("more", "--prompts ../secret/config.json", "leads out"),
        ("more", "--recipe out.yml --tune parameters.weight=0:1", "out.yml, line 2: '../secret' leads out"),
        ("more", "--recipe none.yml", "none.yml"),
        ("more", "--score function:os:system", "left to the command line"),
        ("more", "--limitz growth=2", "--limits"),
        ("more", "--help", "mergekit-lite boost --help"),
        ("more", "'", "No closing quotation"),
    ],
)
def test_what_reaches_out_is_not_started(places: Places, field: str, given: str, said: str) -> None:
    with pytest.raises(UsageError) as refused:
        boost_arguments(places, **FIELDS | {field: given})
    assert said in str(refused.value)


@pytest.mark.parametrize("checkpoints", ["run", "run/step-*"])
def test_no_checkpoint_of_a_run_leads_out(places: Places, checkpoints: str) -> None:
    with pytest.raises(UsageError, match="leads out"):
        boost_arguments(places, **FIELDS | {"tuned": checkpoints, "more": "--tune to_step=3:9"})


def test_one_run_goes_on_at_a_time_of_whatever_kind(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "PROGRAM", SLEEPS)
    monkeypatch.setattr(residing, "PROGRAM", ANSWERS_LATE)
    resident = Resident(places.root)
    merges, searches, chats = (Runs(places.root, kind) for kind in (running.MERGE, BOOST, PREVIEW))
    searches.launch(["boost"], "boosted")
    try:
        assert searches.state().kind == "running" and merges.state().kind == "none"
        with pytest.raises(UsageError, match="A run goes on"):
            merges.start("", "merged", ["merged"])
        with pytest.raises(UsageError, match="A run goes on"):
            ask(places, chats, resident, ("./sft", "./dpo"), (0, 0.5), 8, "What?")
        assert not resident.holds
        chats.stop()  # not its own
        assert Runs(places.root, BOOST).state().kind == "running"
        wait(lambda: "it sleeps" in searches.state().said)
    finally:
        searches.stop()
    wait(lambda: searches.state().kind == "failed")  # nothing of a search is there to go on with
    ask(places, chats, resident, ("./sft", "./dpo"), (0, 0.5), 8, QUESTION)
    wait(lambda: b"it sleeps" in (chats.folder / "preview.out").read_bytes())
    assert chats.state().kind == "running" and searches.state().kind == "failed"
    chats.stop()
    wait(lambda: chats.state().kind == "failed")
    asked = ({"role": "user", "content": QUESTION},)
    assert chat(chats) == Chat(("./sft", "./dpo"), ("0", "0.5"), (asked, asked), answered=False)
    forget(chats, resident)
    assert chat(chats) == Chat() and not resident.holds


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"models": ("", "./dpo")}, "Choose the models"),
        ({"models": ("../secret", "./dpo")}, "leads out"),
        ({"models": ("--device", "./dpo")}, "there is no model"),
        ({"alphas": (0.5, 0.5)}, "take two"),
        ({"alphas": (None, 0.5)}, "is a number"),
        ({"most": 100_000}, "from 1 to 1,024"),
        ({"question": " "}, "Ask something"),
    ],
)
def test_what_can_not_be_asked_is_told(places: Places, changed: dict[str, Any], said: str) -> None:
    asked: dict[str, Any] = {"models": ("./sft", "./dpo"), "alphas": (0, 0.5), "most": 8, "question": "What?"}
    with pytest.raises(UsageError, match=said):
        ask(places, Runs(places.root, PREVIEW), Resident(places.root), **asked | changed)


@pytest.fixture
def resident(root: Path) -> Iterator[Resident]:
    found = Resident(root)
    yield found
    found.let_go()


def test_a_chat_keeps_its_models_while_it_is_open(
    root: Path, resident: Resident, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process answers, other files are read anew, other models in the place of those; it ends with the chat."""
    monkeypatch.chdir(root)
    places, chats = Places(root, tmp_path), Runs(root, PREVIEW)

    def answered(question: str, *models: str) -> int:
        ask(places, chats, resident, models, (0, 16), 8, question)
        process = int(json.loads((chats.folder / "preview.json").read_text())["process"])
        wait(lambda: chats.state().kind != "running")
        told = chat(chats)
        assert told.answered and told.held > 0, chats.state()
        asked = [talk[:-1] for talk in told.conversations]
        made = preview(str(root / models[0]), str(root / models[1]), asked, alphas=[0, 16], max_tokens=8)
        for number, talk in enumerate(told.conversations):
            assert talk[-1]["content"] == made[number].answers[number].text
        return process

    shutil.copytree(root / "dpo", root / "changed")
    first = answered("One?", "./sft", "./changed")
    chats.stop()  # nothing goes on: the process is not hit
    assert answered("Two?", "./sft", "./changed") == first and resident.holds
    shutil.copy(root / "sft" / "model.safetensors", root / "changed")
    assert answered("Three?", "./sft", "./changed") == first
    assert answered("Four?", "./dpo", "./sft") == first
    forget(chats, resident)
    assert not resident.holds
    wait(lambda: not Path(f"/proc/{first}").exists())
    assert answered("Five?", "./sft", "./dpo") != first
    os.kill(int(json.loads((chats.folder / "preview.json").read_text())["process"]), signal.SIGKILL)
    wait(lambda: not resident.holds)
    assert answered("Six?", "./sft", "./dpo") and len(chat(chats).conversations[0]) == 4
    forget(chats, resident)


def test_a_search_is_shown_as_it_stands_and_answers_are_text(tmp_path: Path) -> None:
    evaluator = Answering(peak, items=300)
    shown: list[str] = []
    with Study(tmp_path, {}, evaluator.items) as study:
        asked = {item: f"What is {item}? {HOSTILE}" for item in evaluator.items}
        record.write_items(tmp_path, study.items, asked)

        def look(result: Any) -> None:
            record.write_so_far(tmp_path, result, {})
            shown.append(found(tmp_path))

        values = {"alpha": [1.0, 2.0, 16.0]}
        result = boost(lambda same: grid(values), evaluator, study, Settings(score="score"), so_far=look)
        for number, page in enumerate(shown):
            assert f"{number} candidate" in page and "nothing is chosen yet" in page
            assert page.count("</tr>") == 2 + number
        write(result, study, {}, asked)
    assert result.chosen is not None and in_part(tmp_path) == ""
    (tmp_path / "candidates" / "alpha=3.partial.jsonl").write_text("{}\n{}\n")
    assert in_part(tmp_path) == "In part measured: alpha=3 on 2 items."
    page = found(tmp_path)
    assert "beats alpha=0" in page and "<svg" in page and "95 % intervals" in page and "so far" not in page
    assert names_of(tmp_path) == ["alpha=0", "alpha=1", "alpha=2", "alpha=16"]
    answers = beside(tmp_path, [], 2)
    assert answers.count("<pre") == 3 and f"alpha={result.chosen['alpha']:g}" in answers
    assert f"What is {study.items[1]}?" in answers and f"What is {study.items[0]}?" not in answers
    assert "<script" not in answers and "&lt;script&gt;" in answers
    dropped = beside(tmp_path, ["alpha=0", "alpha=16"], 290)
    assert "not measured on this item" in dropped
    assert "Item 150 of" in beside(tmp_path, ["alpha=0"], 150) and "Item 300 of" in beside(tmp_path, [], 10_000)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root")
    write_models(root)
    write_prompts(root)
    write_pairs(root, 64)
    return root


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Server]:
    with serving(root) as server:
        yield server


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Page]:
    with at(browser, server) as page:
        page.get_by_role("tab", name="Choose").click()
        yield page


def fill(page: Page, **fields: str) -> None:
    """By keyboard."""
    for name, text in fields.items():
        box = page.locator(f"#choose-{name} input, #choose-{name} textarea").first
        fill_in(box, text)
        box.press("Tab")


def shows_item(page: Page, number: int) -> None:
    """Ask for an item as one does by hand; where Gradio lost it, another one comes between, as the same is no news."""
    answers, asked = page.locator("#choose-answers"), [number]

    def ask_for() -> None:
        for each in asked:
            page.locator("#choose-item input").fill(str(each))
            page.keyboard.press("Tab")
        asked[:] = [number + 1, number]

    until_seen(ask_for, lambda patience: expect(answers).to_contain_text(f"Item {number} of 24", timeout=patience))


def test_from_a_path_out_of_the_root_to_the_commands_bytes(page: Page, root: Path) -> None:
    """The pairs decide; prompts are answered, too, so that there are guards and samples."""
    fill(page, sft="../sft", aligned="./dpo", data="pairs.jsonl", score="pairs", alphas="16,24", output="of-page")
    page.locator("#choose-start").click()
    expect(page.locator("#choose-refused")).to_contain_text("leads out of")
    more = "--prompts prompts.jsonl --score log_ratio --max-tokens 6 --limits growth=none --limits repetition=none"
    fill(page, sft="./sft", more=f"{more} --confidence 3")
    page.locator("#choose-check").click()
    expect(page.locator("#choose-refused")).to_contain_text("--confidence: expected a number from 0.5 up to 0.999")
    fill(page, more=more)
    page.locator("#choose-start").click()
    expect(page.locator("#choose-state .done")).to_contain_text("mergekit-lite boost ./sft ./dpo --search grid")
    expect(page.locator("#choose-curve")).to_contain_text("beats alpha=0")
    expect(page.locator("#choose-curve svg").first).to_be_visible()
    expect(page.locator("#choose-curve tbody tr")).to_have_count(4)  # the baseline, two, the chosen one held out
    page.get_by_role("button", name="Answers side by side").click()
    expect(page.locator("#choose-answers .beside pre")).to_have_count(2)
    shows_item(page, 5)
    page.locator("#choose-report").click()
    expect(page.frame_locator("#choose-page iframe").locator("h1")).to_contain_text("beats alpha=0")

    arguments = ["--search", "grid", "--pairs", "pairs.jsonl", "--score", "pairs", "--grid", "16,24", *more.split()]
    command(root, "boost", "./sft", "./dpo", *arguments, "-o", "of-command")
    assert weights(root / "of-page") == weights(root / "of-command") != {}
    page.locator("#choose-start").click()
    expect(page.locator("#choose-refused")).to_contain_text("exists")


def test_two_alphas_answer_beside_each_other(page: Page, root: Path) -> None:
    """The answers are those of the command; the conversation goes on with each one's own."""
    fill(page, sft="./sft", aligned="./dpo")
    page.get_by_role("button", name="Chat with two alphas").click()
    for name, number in (("first", "0"), ("second", "16"), ("most", "8")):
        fill_in(page.locator(f"#chat-{name} input"), number)
    fill_in(page.locator("#chat-question textarea"), QUESTION)
    page.locator("#chat-ask").click()
    columns = page.locator("#chat-told .done .beside > div")
    expect(columns).to_have_count(2)
    expect(columns.first.locator("pre")).to_have_text([QUESTION, answers(root, 0, 1)])
    assert page.title() == "mergekit-lite" and not page.locator("#chat-told img").count()
    fill_in(page.locator("#chat-question textarea"), "And two?")
    page.locator("#chat-ask").click()
    expect(columns.first.locator("pre")).to_have_count(4)
    expect(columns.last.locator("pre")).to_have_count(4)
    expect(columns.last.locator("pre").last).to_have_text(answers(root, 1, 2))
    page.locator("#chat-anew").click()
    expect(columns).to_have_count(0)


def answers(root: Path, number: int, turns: int) -> str:
    """What the alpha with this number answers to its own conversation on the disk; both are asked, as the page does."""
    rows = [json.loads(line) for line in (root / FOLDER / "chat.jsonl").read_text().splitlines()]
    messages = rows[number]["messages"]
    assert len(messages) == 2 * turns - 1
    (made,) = preview(str(root / "sft"), str(root / "dpo"), [messages], alphas=[0.0, 16.0], max_tokens=8)
    return plain(made.answers[number].text)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_choosing_fits_a_narrow_window(browser: Any, server: Server, root: Path, scheme: str) -> None:
    with at(browser, server, viewport={"width": 400, "height": 800}, color_scheme=scheme) as page:
        page.get_by_role("tab", name="Choose").click()
        for name in ("Answers side by side", "Chat with two alphas"):
            page.get_by_role("button", name=name).click()
        expect(page.locator("#chat-question")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= 400


# The page's command and those that it runs: a search goes on from a candidate as far as a file in the root lets it.
HELD = """\
import time
from pathlib import Path
from mergekit_lite.boosting import record
write = record.write_so_far
def write_and_wait(folder, result, about):
    write(folder, result, about)
    while len(result.points) >= int(Path("most").read_text()):
        time.sleep(0.01)
record.write_so_far = write_and_wait
"""
HOLDING = f"""\
from mergekit_lite.commands.app import runs
runs.PROGRAM = (*runs.PROGRAM[:2], {HELD!r} + runs.PROGRAM[2])
{PROGRAM}
"""


@pytest.mark.slow
def test_a_search_is_stopped_and_goes_on_after_the_server_was_killed(browser: Any, root: Path) -> None:
    """It waits after each candidate until the next one is allowed, so that it never ends by itself."""
    searches = Runs(root, BOOST)
    most = root / "most"
    program = ("-c", HOLDING, "app", "--root", str(root))
    try:
        with serving(root, program) as server, at(browser, server) as page:
            page.get_by_role("tab", name="Choose").click()
            fill(page, sft="./sft", aligned="./dpo", data="pairs.jsonl", score="pairs", alphas="1,2,3,4", output="long")
            most.write_text("1")
            page.locator("#choose-start").click()
            expect(page.locator("#choose-curve")).to_contain_text("nothing is chosen yet")
            expect(page.locator("#choose-curve tbody")).to_contain_text("alpha=1")
            page.locator("#choose-stop").click()
            expect(page.locator("#choose-state .stopped")).to_contain_text("Interrupted")
            first = candidates(root)
            assert len(first) == 1
            most.write_text("2")
            page.locator("#choose-resume").click()
            wait(lambda: len(candidates(root)) == 2)
            server.kill()
        with serving(root, program) as server, at(browser, server) as page:
            page.get_by_role("tab", name="Choose").click()
            expect(page.locator("#choose-state .running")).to_be_visible()  # it outlived its server
            assert searches.state().kind == "running"
            os.killpg(json.loads((root / FOLDER / "boost.json").read_text())["process"], signal.SIGKILL)
            expect(page.locator("#choose-state .stopped")).to_be_visible()
            second = candidates(root)
            assert second[:1] == first and len(second) == 2
            most.write_text("3")
            page.locator("#choose-resume").click()
            wait(lambda: len(candidates(root)) == 3)
            assert candidates(root)[:2] == second
            page.locator("#choose-stop").click()
            expect(page.locator("#choose-state .stopped")).to_contain_text("Interrupted")
    finally:
        searches.stop()


def candidates(root: Path) -> list[Any]:
    """The figures of the candidates that are in, without their times."""
    path = root / "long.boost" / record.SO_FAR
    listed = json.loads(path.read_text())["candidates"] if path.exists() else []
    return [(each["numbers"], each["gain"]) for each in listed]
