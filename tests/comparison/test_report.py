"""What a comparison is written as: the screen, JSON, CSV, pictures, and a page in a real browser."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from click.testing import CliRunner

from mergekit_lite.commands import main
from mergekit_lite.comparison import plots
from mergekit_lite.comparison.comparison import Comparison, compare
from mergekit_lite.comparison.html_report import page
from tests.browser import Browser
from tests.models import State, state, tuned, write_folder

HOSTILE = (
    '"><script>document.title = "taken"</script>',
    "<img src=x onerror=\"document.title = 'taken'\">",
    "$\\frac{1}{$",
    '=HYPERLINK("http://example.invalid")',
    "[bold]markup[/nothing]",
)


def states() -> list[State]:
    base = state(0, hidden=16)
    base |= {name: torch.full((4, 4), 0.5).bfloat16() for name in HOSTILE}
    return [base, tuned(base, 1), tuned(base, 2, rms=1e-4)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    for name, one in zip(("base", "math", "code"), states(), strict=True):
        write_folder(folder / name, one)
    return folder


@pytest.fixture(scope="module")
def comparison(place: Path) -> Comparison:
    return compare(place / "base", [place / "math", place / "code"])


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as one:
        yield one


@pytest.fixture
def shown(browser: Browser, comparison: Comparison, tmp_path: Path) -> Browser:
    path = tmp_path / "report.html"
    path.write_text(page(comparison), encoding="utf-8")
    browser.events.clear()
    browser.open(path)
    return browser


def invoke(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["compare", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_the_screen_tells_names_as_they_are(place: Path) -> None:
    code, told, err = invoke(*(str(place / name) for name in ("base", "math", "code")), "-v")
    assert code == 0 and all(name in told.replace("\n", "") for name in HOSTILE), err
    for part in ("RMS(delta)", "cosine", "opposite", "model.layers.1", "bfloat16", "orthogonal", "VaRM"):
        assert part in told
    assert "\x1b" not in told + err


def test_a_terminal_of_80_columns_is_enough(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from mergekit_lite.commands import screen

    monkeypatch.chdir(place)
    monkeypatch.setattr(screen, "console", lambda stream: Console(file=stream, width=80, highlight=False))
    code, told, _ = invoke("base", "math", "code", "-v")
    assert code == 0 and max(map(len, told.splitlines())) <= 80
    assert "…" not in told.split("•")[0] and re.search(r"^A +\S+e-0\d .* like|larger", told, re.MULTILINE)


@pytest.mark.parametrize("option", ["--csv", "--html"])
def test_a_file_that_cannot_be_written_is_told(option: str, place: Path, tmp_path: Path) -> None:
    (tmp_path / "writing-figures").mkdir()  # stands where it is written first
    code, _, err = invoke(str(place / "base"), str(place / "math"), option, str(tmp_path / "figures"), "-q")
    assert code == 1 and f"Can't write {tmp_path / 'figures'}: Is a directory." in err
    assert not (tmp_path / "figures").exists()


def test_json_and_csv_hold_the_same_figures(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "figures.csv"
    code, told, _ = invoke(*(str(place / name) for name in ("base", "math", "code")), "--json", "--csv", str(file))
    data = json.loads(told)
    rows = list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))
    assert code == 0 and len(rows) == 2 * (1 + len(data["layers"]) + len(data["tensors"]))
    by_name = {(row["unit"], row["name"], row["model"]): row for row in rows}
    assert float(by_name["all", "", "B"]["rms"]) == data["overall"]["rms"][1]
    for tensor in data["tensors"]:
        name = f"'{tensor['name']}" if tensor["name"].startswith("=") else tensor["name"]
        row = by_name["tensor", name, "A"]
        assert [row["cosine with A"], row["cosine with B"]] == ["", _text(tensor["cosine"][0][1])]
        assert row["alpha 0.3 in bfloat16"] == _text(tensor["effective"][0][1][0])
    assert all(not cell.startswith(("=", "+", "@")) for row in rows for cell in row.values())


def _text(figure: float | None) -> str:
    return "" if figure is None else str(figure)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--top-k", "0"], "top-k"),
        (["--select-topk", "2"], "select-topk"),
        (["--dtype", "bf61"], "bf61"),
        (["--plot", "x.gif"], ".png, .svg, .pdf"),
        (["--html", "nowhere/x.html"], "there is no folder nowhere"),
    ],
)
def test_mistakes_are_told_before_anything_is_read(arguments: list[str], told: str) -> None:
    code, _, err = invoke("missing", "models", *arguments)
    assert code == 2 and told in err


def test_without_matplotlib_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for option in ("--plot=x.png", "--html=x.html"):
        code, _, err = invoke("missing", "models", option)
        assert code == 2 and "pip install 'mergekit-lite[plot]'" in err


def test_the_panels_have_titles_axes_and_the_right_cells(comparison: Comparison) -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    plots.heat_map(figure, comparison)
    first, _, outside, *_ = figure.axes
    assert figure.get_suptitle().startswith("RMS of the change")
    assert first.get_title() == "A − base" and first.get_ylabel() == "layer"
    assert [label.get_text() for label in first.get_yticklabels()] == ["0", "1"]
    modules = [label.get_text() for label in first.get_xticklabels()]
    assert sorted(modules) == ["input_layernorm", "mlp.up_proj", "self_attn.q_proj"]
    cells = first.images[0].get_array()
    assert cells is not None and cells.shape == (2, 3)
    of_tensor = {one.tensor.name: comparison.figures(one) for one in comparison.tensors}
    wanted = of_tensor["model.layers.1.mlp.up_proj.weight"].rms[0]
    assert cells[1, modules.index("mlp.up_proj")] == pytest.approx(wanted)
    assert outside.get_xlabel() == "outside the layers" and "log" in figure.axes[-1].get_ylabel()

    figure = Figure()
    plots.cosine_matrix(figure, comparison)
    axes, beside, _ = figure.axes
    assert comparison.models[1][-20:] in beside.texts[0].get_text()
    assert axes.get_title() and axes.get_xlabel() == axes.get_ylabel() == "model"
    assert axes.texts[0].get_text() == "1.00" and len(axes.texts) == 4

    figure = Figure()
    plots.histogram(figure, comparison)
    [axes] = figure.axes
    assert (axes.get_xscale(), axes.get_ylabel()) == ("log", "weights (%)") and "|delta|" in axes.get_xlabel()
    assert len(axes.get_legend().get_texts()) == 2
    assert sum(axes.patches[0].get_data().values) == pytest.approx(100 * comparison.overall.changed[0])


@pytest.mark.parametrize("ending", [".png", ".svg", ".pdf"])
def test_pictures_open(ending: str, comparison: Comparison, tmp_path: Path) -> None:
    path = tmp_path / f"plot{ending}"
    plots.save(comparison, path)
    if ending == ".png":
        from matplotlib.image import imread

        height, width, _ = imread(path).shape
        assert width == 770 and height > width
    elif ending == ".svg":
        ElementTree.parse(path)
    else:
        assert path.read_bytes().startswith(b"%PDF")


def test_one_model_and_eight_and_one_tensor_are_drawn(tmp_path: Path) -> None:
    base = {"weight": torch.ones(4, 4)}
    paths = [write_folder(tmp_path / str(n), {"weight": base["weight"] + n / 100}) for n in range(9)]
    for many in (1, 8):
        found = compare(paths[0], paths[1 : 1 + many])
        plots.save(found, tmp_path / "plot.png")
        assert page(found).count("<svg") == (2 if many == 1 else 3)
    assert page(compare(paths[0], paths[:1])).count("<svg") == 2  # nothing changed


def test_the_page_opens_without_errors_or_requests(shown: Browser) -> None:
    assert shown.errors == []
    assert shown.requests[0].startswith("file:") and all(one.startswith("data:") for one in shown.requests[1:])
    assert shown.run("document.title").startswith("What 2 models changed in ")
    assert shown.run("document.querySelectorAll('svg').length") == 3
    assert shown.run("document.querySelectorAll('script').length") == 1
    assert shown.run("document.querySelectorAll('img, iframe, link').length") == 0


def test_names_are_text_in_the_page(shown: Browser) -> None:
    names = shown.run("[...document.querySelectorAll('[aria-label=Tensors] tbody th')].map(e => e.textContent)")
    assert set(HOSTILE) <= set(names)


def test_foreign_scripts_would_not_run(shown: Browser) -> None:
    shown.run("const s = document.createElement('script'); s.textContent = 'window.taken = 1'; document.body.append(s)")
    assert shown.run("window.taken") is None


def test_a_click_sorts_a_table_by_numbers_and_another_one_the_other_way(shown: Browser) -> None:
    table = "document.querySelector('table[aria-label=Tensors]')"
    head = f"[...{table}.querySelectorAll('button')].find(e => e.textContent === 'RMS A')"
    column = f"[...{table}.tBodies[0].rows].map(row => Number(row.cells[2].dataset.value))"
    before = shown.run(column)
    shown.click(head)
    down = shown.run(column)
    assert down == sorted(before, reverse=True) != before
    assert shown.run(f"{head}.parentElement.getAttribute('aria-sort')") == "descending"
    shown.click(head)
    assert shown.run(column) == sorted(before)
    assert shown.run(f"{table}.querySelectorAll('[aria-sort]').length") == 1
    shown.click(f"{table}.querySelector('button')")
    names = shown.run(f"[...{table}.tBodies[0].rows].map(row => row.cells[0].textContent)")
    assert len(names) == len(before) and names[0] > names[-1]
    assert shown.errors == []


def test_the_page_fits_a_phone_and_follows_the_colour_scheme(shown: Browser, tmp_path: Path) -> None:
    colours = set()
    for dark in (False, True):
        shown.open(tmp_path / "report.html", width=390, height=800, dark=dark)
        assert shown.run("document.documentElement.scrollWidth") <= 390
        colours.add(shown.run("getComputedStyle(document.body).backgroundColor"))
        ink = shown.run("getComputedStyle(document.body).color")
        assert shown.run("getComputedStyle(document.querySelector('svg text')).fill") == ink
    assert len(colours) == 2
    picture = tmp_path / "phone.png"
    shown.screenshot(picture)
    assert picture.stat().st_size > 10_000


def test_everything_can_be_reached_and_has_a_name(shown: Browser) -> None:
    assert shown.run("document.documentElement.lang") == "en"
    assert shown.run("[...document.querySelectorAll('svg')].every(e => e.getAttribute('aria-label'))")
    assert shown.run("[...document.querySelectorAll('.scroll')].every(e => e.tabIndex === 0)")
    assert shown.run("[...document.querySelectorAll('thead th')].every(e => e.scope === 'col')")


def test_comparing_imports_matplotlib_only_for_plots(place: Path) -> None:
    code = (
        "import sys; from mergekit_lite.commands import main\n"
        "try: main(['compare', 'base', 'math', '-q'])\n"
        "except SystemExit as done: assert not done.code\n"
        "assert not {'matplotlib', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=place)
