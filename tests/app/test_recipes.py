"""What the page makes of recipes: several documents, warnings, gradients, templates, time; without a browser."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from click.testing import CliRunner

from mergekit_lite.commands import main
from mergekit_lite.commands.app.curves import curves
from mergekit_lite.commands.app.numbers import numbers, with_number
from mergekit_lite.commands.app.pace import Pace
from mergekit_lite.commands.app.places import Places
from mergekit_lite.commands.app.planned import documents_by_range, planned, shown, tree_of
from mergekit_lite.commands.app.tabs.recipe import templates
from mergekit_lite.recipe import RecipeError
from mergekit_lite.recipe.documents import parse_documents
from tests.models import state, tuned, write_folder
from tests.shipped import FILES

STEM = """\
name: stem
merge_method: linear
models:
  - {model: ./math, parameters: {weight: 0.5}}
  - {model: ./code, parameters: {weight: 0.5}}
"""
LAST = """\
---
merge_method: task_arithmetic
base_model: ./base
models:
  - model: stem
    parameters: {weight: 0.8}
"""
TWO = STEM + LAST
APART = f"{STEM}---\n{STEM.replace('stem', 'other').replace('0.5', '0.25')}"
LAYERS = 5


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    root = tmp_path / "root"
    base = state(0, layers=LAYERS)
    write_folder(root / "base", base)
    write_folder(root / "math", tuned(base, 1))
    write_folder(root / "code", tuned(base, 2))
    (tmp_path / "cache").mkdir()
    monkeypatch.chdir(root)
    return Places(root, tmp_path / "cache")


def test_documents_are_planned_in_their_order(places: Places) -> None:
    last_first = LAST.removeprefix("---\n") + "---\n" + STEM
    for text in (TWO, last_first):
        result = planned(text, "merged", places)
        assert not result.problems and [step.name for step in result.steps] == ["stem", ""]
        assert result.outputs == ["merged"]
        page = shown(result)
        assert "Document &#x27;stem&#x27;: made while the next one reads it" in page and "The last document" in page
        assert page.index("linear weight 0.5") < page.index("task_arithmetic weight 0.8")


def test_several_outputs_are_named_as_the_command_names_them(places: Places) -> None:
    assert planned(APART, "out", places).outputs == ["out-stem", "out-other"]


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("model: stem", "model: stme", 10, "no model 'stme'"),
        ("model: stem", "model: ../secret", 10, "leads out"),
        ("model: stem", "model: stem+../secret", 10, "leads out"),
        ("./math", "./maht", 4, "Did you mean './math'?"),
        ("{weight: 0.8}", "{wieght: 0.8}", 11, "Did you mean 'weight'?"),
        ("name: stem", "name: [stem]", 1, "'name' expects"),
        ("{weight: 0.8}", "{weight: 0.8}\n  - {model: ./other, parameters: {weight: 1}}", 7, "shape"),
    ],
)
def test_a_problem_stands_at_the_line_of_its_document(places: Places, old: str, new: str, line: int, said: str) -> None:
    write_folder(places.root / "other", state(3, layers=LAYERS, hidden=16))
    found = planned(TWO.replace(old, new), "merged", places)
    assert any(at == line and said in problem for at, problem in found.problems), found.problems


def test_a_filter_a_line_is_read_once_and_not_all_told(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text of a name needs no regular expression, and the text of a recipe one reading; the page has bounds."""
    read: list[object] = []
    compose_all = yaml.compose_all
    monkeypatch.setattr(yaml, "compose_all", lambda *given, **more: read.append(given) or compose_all(*given, **more))
    compiled: list[object] = []
    compile_ = re.compile
    monkeypatch.setattr(re, "compile", lambda *given: compiled.append(given) or compile_(*given))
    text = STEM.removeprefix("name: stem\n")
    idle = "".join(f"  - layers.{number}.mlpx\n" for number in range(300))
    result = planned(f"{text}exclude:\n  - mlp.up_proj\n{idle}", "merged", places)
    assert len(read) == 1 and len(compiled) < 100
    assert result.plan is not None and len(result.plan.notes) == 300
    assert {job.name for job in result.plan.jobs if job.why == "excluded"} == {
        job.name for job in result.plan.jobs if "mlp.up_proj" in job.name
    }
    page = shown(result)
    assert page.count('class="warning"') == 100 and "… and 200 warnings more" in page
    wrong = planned(text + "".join(f"wrong{number}: 1\n" for number in range(300)), "merged", places)
    assert len(wrong.problems) == 300 and "300 problems" in shown(wrong)
    assert shown(wrong).count("<li>") == 100 and "… and 200 problems more" in shown(wrong)


def test_all_problems_are_told_at_once(places: Places) -> None:
    text = TWO.replace("./math", "../math").replace("{weight: 0.8}", "{wieght: 0.8}")
    assert [line for line, _ in planned(text, "merged", places).problems] == [4, 11]


def test_sliders_move_the_numbers_of_all_documents(places: Places) -> None:
    found = numbers(tree_of(TWO))
    assert [(each.value, each.at.line) for each in found] == [(0.5, 4), (0.5, 5), (0.8, 11)]
    assert with_number(TWO, found[2], 0.75) == TWO.replace("0.8", "0.75")


IGNORED = """\
merge_method: linear
models:
  - model: ./math
    parameters: {weight: 0.5, int8_mask: true}
  - model: ./code
    parameters: {weight: 0.5}
name: mine
density: 0.3
parameters: {normalize: true, embed_slerp: true}
chat_template: auto
architecture: LlamaForCausalLM
"""


def test_what_mergekit_ignores_is_a_warning_as_by_the_command(places: Places) -> None:
    """Whatever the command warns of, the page does, word by word."""
    Path("recipe.yml").write_text(IGNORED)
    done = CliRunner().invoke(main, ["merge", "recipe.yml", "-o", "merged", "--dry-run"])
    assert done.exit_code == 0, done.output
    told = re.split(r"(?m)^Warning: ", done.stderr)[1:]
    result = planned(IGNORED, "merged", places)
    assert not result.problems
    page = shown(result)
    warned = re.findall(r'<p class="warning">⚠ (.*?)</p>', page)
    plainly = [" ".join(each.replace("&#x27;", "'").split()) for each in warned]
    assert [" ".join(each.split()) for each in told] == plainly
    for key in ("name", "density", "int8_mask", "embed_slerp", "architecture"):
        assert any(key in each for each in plainly), (key, plainly)


GRADIENTS = """\
merge_method: slerp
base_model: ./math
models: [{model: ./math}, {model: ./code}]
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 1]}
    - {filter: mlp, value: [1.5, -0.25]}
    - value: 0.5
"""


def test_a_gradient_is_drawn_as_the_layers_get_it(places: Places) -> None:
    """Every dot stands at the number that the plan gives its layer, in the scale of the axis."""
    result = planned(GRADIENTS, "merged", places)
    assert result.plan is not None, result.problems
    drawn = ElementTree.fromstring(curves(result))
    (picture,) = (each for each in drawn.iter("svg") if each.get("role") == "img")
    label = picture.get("aria-label") or ""
    assert "t in self_attn, line 6: 0, 0.5, 1" in label and "t in mlp, line 7: 1.5, -0.25" in label
    lines = list(picture.iter("g"))
    assert [line.findtext("title") for line in lines] == ["t in self_attn, line 6", "t in mlp, line 7"]
    assert len({(line.find("polyline").attrib["stroke"]) for line in lines}) == 2  # type: ignore[union-attr]
    names = [text.text for text in picture.iter("text")]
    assert {"layer", "value", "0", str(LAYERS - 1), "1.5", "-0.25"} <= set(names)
    marks = {
        text.text: float(text.attrib["y"]) - 3 for text in picture.iter("text") if text.get("text-anchor") == "end"
    }
    scale = (marks["-0.25"] - marks["1.5"]) / (1.5 + 0.25)
    for line, name in zip(lines, ("self_attn", "mlp"), strict=True):
        jobs = [job for job in result.plan.jobs if f".{name}." in job.name]
        of_layer = {int(job.name.split(".")[2]): job.parameters[0]["t"] for job in jobs}
        dots = list(line.iter("circle"))
        assert len(dots) == len(of_layer) == LAYERS
        for layer, dot in enumerate(dots):
            drawn_value = 1.5 - (float(dot.attrib["cy"]) - marks["1.5"]) / scale
            assert drawn_value == pytest.approx(of_layer[layer], abs=0.01)
    items = ["".join(item.itertext()) for item in drawn.iter("li")]
    assert items == ["t in self_attn, line 6: 0, 0.5, 1", "t in mlp, line 7: 1.5, -0.25"]


def test_the_curve_follows_the_text_and_has_no_markup_of_strangers(places: Places) -> None:
    assert "0.5, 0.75" in curves(planned(GRADIENTS.replace("0.5, 1]", "0.5, 0.75]"), "merged", places))
    assert curves(planned(STEM.replace("name: stem\n", ""), "merged", places)) == ""
    hostile = GRADIENTS.replace("self_attn", "'<img src=x onerror=alert(1)>'")
    assert "<img" not in curves(planned(hostile, "merged", places))
    wrong = GRADIENTS.replace("./code", "./cdoe")  # a recipe that can't be planned is drawn, without its layers
    assert "last layer" in curves(planned(wrong, "merged", places))


def test_templates_are_the_recipes_that_merge_takes() -> None:
    known = templates()
    assert {path.resolve() for path in known.values()} == {path.resolve() for path in FILES}
    assert next(iter(known)).startswith("methods/") and "documents/warp" in known
    for path in known.values():
        text = path.read_text(encoding="utf-8")
        parse_documents(text)
        numbers(tree_of(text))


def test_time_is_told_and_measured_once(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    from mergekit_lite.commands.app import pace as module

    counted = {"costs": 0, "machine": 0}

    def counting(name: str, function: object) -> object:
        def call(*arguments: object) -> object:
            counted[name] += 1
            return function(*arguments)  # type: ignore[operator]

        return call

    monkeypatch.setattr(module, "measured_costs", counting("costs", module.measured_costs))
    monkeypatch.setattr(module, "this_cluster", counting("machine", module.this_cluster))
    pace = Pace(places)
    for weight in ("0.8", "0.7", "0.6"):
        steps = planned(TWO.replace("0.8", weight), "merged", places).steps
        assert re.match(r"about .* on this machine", pace.told(steps, 0.01))
    assert counted == {"costs": 1, "machine": 1}
    apart = pace.told(planned(APART, "merged", places).steps, 0.01)
    assert re.match("about .* for all documents; the last one: about ", apart)


@pytest.mark.parametrize("name", ["x" * 300, f"org/{'x' * 300}", f"./base+org/{'x' * 300}:0.5", f"org/x+{'y' * 5000}"])
def test_a_name_that_no_file_can_have_is_a_problem(places: Places, name: str) -> None:
    found = planned(TWO.replace("./math", name), "merged", places).problems
    assert [line for line, _ in found] == [4], found


def test_models_of_the_hub_are_known_by_their_names(places: Places) -> None:
    text = TWO.replace("./math", "org/math").replace("./base", "org/base@main")
    tree = tree_of(text)
    assert tree is not None and list(places.of_hub(tree)) == ["org/math", "org/base@main"]
    assert [line for line, _ in planned(text, "merged", places).problems] == [4, 8]
    assert [document.name for document in documents_by_range(text, places)] == ["stem", ""]
    with pytest.raises(RecipeError, match="leads out"):
        documents_by_range(text.replace("./code", "../secret"), places)
    ((line, said),) = planned(TWO.replace("./math", "./math+org/lora:0.5"), "merged", places).problems
    assert line == 4 and "org/lora:" in said and "mergekit-lite inspect ./math+org/lora:0.5" in said
    (places.root / "org" / "math").mkdir(parents=True)  # what is here is no repository
    assert list(places.of_hub(tree)) == ["org/base@main"]
