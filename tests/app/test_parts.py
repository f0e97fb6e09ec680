"""What the page lets through, reads and writes back, without a browser."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any

import pytest

from mergekit_lite.commands.app.guard import MOST_BYTES, Guard
from mergekit_lite.commands.app.numbers import numbers, with_number
from mergekit_lite.commands.app.places import Places
from mergekit_lite.commands.app.planned import documents_by_range, planned, shown, tree_of
from mergekit_lite.errors import UsageError
from mergekit_lite.recipe import RecipeError
from tests.models import state, write_folder

TIES = """\
merge_method: ties
base_model: ./base
models:
  - model: ./math
    parameters: {weight: 0.5, density: [0.3, 0.7]}  # of the first
  - model: ./code
    parameters: {weight: 0.5, density: 0.5}
"""


def problems(text: str, places: Places) -> list[tuple[int | None, str]]:
    return list(planned(text, "merged", places).problems)


def test_a_sound_recipe_is_planned(places: Places) -> None:
    result = planned(TIES, "merged", places)
    assert result.plan is not None and not result.problems
    page = shown(result)
    assert "density 0.3 … 0.7" in page and "along 2 layers" in page


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("weight: 0.5, density: [", "weigth: 0.5, density: [", 5, "Did you mean 'weight'?"),
        ("./math", "./maht", 4, "Did you mean './math'?"),
        ("./code", "org/code", 6, "what its download takes"),
        ("ties", "teis", 1, "Did you mean 'ties'?"),
        ("0.7]", "0.7", 5, "not YAML"),
    ],
)
def test_a_problem_has_its_line(places: Places, old: str, new: str, line: int, said: str) -> None:
    found = problems(TIES.replace(old, new), places)
    assert any(at == line and said in text for at, text in found), found


@pytest.mark.parametrize(
    "reference",
    [
        "../secret", "{out}/secret", "./base/../../secret", "~/model", "link", "./inside", "base+../secret",
        "base+vector:{out}/secret:0.5", "hf={out}/secret:base", "hf://../secret", "https://host/model", "link:ema",
        "part=model:{out}/secret", "file:///etc/passwd",
    ],
)  # fmt: skip
def test_no_reference_leads_out(places: Places, reference: str) -> None:
    """Neither by a path, by a link, by a link in a folder, nor behind the signs of a reference."""
    out = places.root.parent
    (places.root / "link").symlink_to(out / "secret")
    (places.root / "inside").mkdir()
    (places.root / "inside" / "model.safetensors").symlink_to(out / "secret" / "model.safetensors")
    reference = reference.format(out=out)
    ((line, said),) = problems(TIES.replace("./math", f'"{reference}"'), places)
    assert line == 4 and ("leads out" in said or "elsewhere" in said), said


@pytest.mark.parametrize("reference", ["hf://org/name", "hf://org/name@main", "./math+hf://org/lora"])
def test_a_repository_is_read_by_range_where_that_is_asked_for(places: Places, reference: str) -> None:
    """The page itself asks nobody: the model's line says where it is done."""
    text = TIES.replace("./math", reference)
    ((line, said),) = problems(text, places)
    assert line == 4 and f"{reference!r} is read by range: tick that in the tab Run" in said
    assert reference in documents_by_range(text, places)[0].recipe.models
    with pytest.raises(RecipeError, match="leads out"):
        documents_by_range(TIES.replace("./math", f"{reference}+../secret"), places)


@pytest.mark.parametrize("pattern", ["li*/step-*", "./l[i]nk/step-1", "runs/*", "../secret*"])
def test_no_pattern_leads_out(places: Places, pattern: str) -> None:
    """Neither what fits it, nor what lies in that."""
    secret = places.root.parent / "secret"
    write_folder(secret / "step-1", state(1))
    (places.root / "link").symlink_to(secret)
    (places.root / "runs").mkdir()
    (places.root / "runs" / "step-1").symlink_to(secret / "step-1")
    text = TIES.replace("  - model: ./math\n", f"  - run: {pattern}\n")
    assert any(at == 4 and "leads out" in said for at, said in problems(text, places)), problems(text, places)


@pytest.mark.parametrize("key", ["run", "statistics", "tokenizer_source"])
def test_no_other_key_leads_out(places: Places, key: str) -> None:
    text = TIES.replace("  - model: ./math\n", f"  - model: ./math\n    {key}: ../secret/step-*\n")
    assert any(at == 5 and "leads out" in said for at, said in problems(text, places))


def test_texts_that_are_no_paths_pass(places: Places) -> None:
    """A chat template is as long as it likes, and a filter has signs of its own."""
    (places.root / "link").symlink_to(places.root.parent / "secret")  # the root itself is never what is read
    template = (
        "see https://host/page {% for m in messages %}" + "{{ m['role'] + ': ' + m['content'] }}" * 200 + "{% endfor %}"
    )
    text = f"{TIES}chat_template: \"{template}\"\nexclude: ['regex:^model\\..*norm', lm_head]\n"
    assert not problems(text, places)


def test_strangers_text_is_text(places: Places) -> None:
    name = "model.layers.0.<img src=x onerror=alert(1)>"
    tensors = state(0) | {name: state(1)["model.norm.weight"]}
    write_folder(places.root / "hostile", tensors)
    text = "merge_method: passthrough\nmodels: [{model: ./hostile}]\nexclude: ['img src']\n"
    result = planned(text, "merged", places)
    assert result.plan is not None, result.problems
    page = shown(result)
    assert "&lt;img src=x" in page and "<img" not in page


@pytest.mark.parametrize("name", ["", "../out", "a/b", ".hidden", "-o", "~", "a\nb", "x" * 300, "{name}"])
def test_an_output_is_a_name(places: Places, name: str) -> None:
    with pytest.raises(UsageError, match="a name of letters"):
        places.output(name)


def test_numbers_are_written_where_they_stand() -> None:
    found = numbers(tree_of(TIES))
    assert [(each.value, each.at.line) for each in found] == [(0.5, 5), (0.3, 5), (0.7, 5), (0.5, 7), (0.5, 7)]
    assert "./math" in found[1].label and "1 of 2" in found[1].label
    text = with_number(TIES, found[2], 0.85)
    assert text == TIES.replace("0.7]", "0.85]")
    assert with_number("merge_method: ties\n", found[2], 0.85) == "merge_method: ties\n"  # the text wins


def test_numbers_beyond_a_range_are_kept() -> None:
    text = TIES.replace("weight: 0.5, density: [", "weight: -3, density: [")
    assert numbers(tree_of(text))[0].least == -3


def answer(path: str = "/config", method: str = "GET", space: Collection[str] = (), **headers: str) -> int:
    """The status of a request, 200 where it got through."""
    told: list[int] = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            told.append(message["status"])

    given = {"host": "127.0.0.1:7860"} | {name.replace("_", "-"): value for name, value in headers.items()}
    scope = {"type": "http", "path": path, "method": method,
             "headers": [(name.encode(), value.encode()) for name, value in given.items()]}  # fmt: skip
    asyncio.run(Guard(inner, 7860, space)(scope, None, send))  # type: ignore[arg-type]
    return told[0]


def test_the_page_itself_is_answered() -> None:
    assert answer("/") == answer("/gradio_api/queue/join") == answer(origin="http://127.0.0.1:7860") == 200
    assert answer(host="localhost:7860", origin="http://localhost:7860", sec_fetch_site="same-origin") == 200
    assert answer("/", sec_fetch_site="cross-site") == 200  # a link to it


@pytest.mark.parametrize(
    ("status", "path", "headers"),
    [
        (403, "/", {"host": "evil.example:7860"}),  # a name that leads here
        (403, "/", {"host": "127.0.0.1:80"}),
        (403, "/gradio_api/queue/join", {"origin": "http://evil.example"}),
        (403, "/gradio_api/queue/join", {"origin": "null"}),
        (403, "/config", {"sec_fetch_site": "cross-site"}),
        (404, "/gradio_api/file=/etc/passwd", {}),
        (404, "/gradio_api/upload", {}),
        (404, "/gradio_api/proxy=http://host/", {}),
        (404, "/monitoring", {}),
        (413, "/gradio_api/queue/join", {"content_length": str(MOST_BYTES + 1)}),
        (413, "/gradio_api/queue/join", {"transfer_encoding": "chunked"}),
    ],
)
def test_nothing_else_is(status: int, path: str, headers: dict[str, str]) -> None:
    assert answer(path, **headers) == status
