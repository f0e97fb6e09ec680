"""The recipes in the repository are right, say how they are run, and comment every key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mergekit_lite.methods import METHODS
from mergekit_lite.recipe import Recipe, outputs, parse, resolve, text_of
from mergekit_lite.recipe.documents import final, parse_documents
from tests.shipped import FILES, ROOT

SEVERAL = sorted((ROOT / "recipes/documents").glob("*.yml"))
RECIPES = [path for path in FILES if path not in SEVERAL]
INSIDE = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm")
NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{layer}.{rest}.weight" for layer in range(32) for rest in INSIDE),
    "model.norm.weight",
    "lm_head.weight",
]
MISTRAL, LLAMA3 = "alignment-handbook/zephyr-7b-sft-full", "princeton-nlp/Llama-3-Base-8B-SFT"
# Table 7 of the paper, and the model cards: aligned model, SFT model, alpha.
PUBLISHED = {
    ("chujiezheng/zephyr_0.05", MISTRAL, 25.0),
    ("chujiezheng/zephyr_0.1", MISTRAL, 8.0),
    ("chujiezheng/zephyr_0.2", MISTRAL, 2.5),
    ("chujiezheng/zephyr_0.4", MISTRAL, 0.5),
    ("alignment-handbook/zephyr-7b-dpo-full", MISTRAL, 0.3),
    ("HuggingFaceH4/zephyr-7b-alpha", "HuggingFaceH4/mistral-7b-sft-alpha", 0.3),
    ("HuggingFaceH4/zephyr-7b-beta", "HuggingFaceH4/mistral-7b-sft-beta", 0.1),
    ("allenai/tulu-2-dpo-7b", "allenai/tulu-2-7b", 0.5),
    ("allenai/tulu-2-dpo-13b", "allenai/tulu-2-13b", 0.5),
    ("allenai/tulu-2-dpo-70b", "allenai/tulu-2-70b", 0.5),
    ("snorkelai/Snorkel-Mistral-PairRM-DPO", "mistralai/Mistral-7B-Instruct-v0.2", 0.3),
    ("RLHFlow/LLaMA3-iterative-DPO-final", "RLHFlow/LLaMA3-SFT", 0.3),
    ("berkeley-nest/Starling-LM-7B-alpha", "openchat/openchat_3.5", 0.2),
    ("Nexusflow/Starling-LM-7B-beta", "openchat/openchat-3.5-0106", 0.5),
    ("internlm/internlm2-chat-1_8b", "internlm/internlm2-chat-1_8b-sft", 0.5),
    ("internlm/internlm2-chat-7b", "internlm/internlm2-chat-7b-sft", 0.5),
    ("internlm/internlm2-chat-20b", "internlm/internlm2-chat-20b-sft", 0.5),
    ("princeton-nlp/Mistral-7B-Base-SFT-RRHF", MISTRAL, 0.1),
    ("princeton-nlp/Mistral-7B-Base-SFT-SLiC-HF", MISTRAL, 0.4),
    ("princeton-nlp/Mistral-7B-Base-SFT-IPO", MISTRAL, 0.5),
    ("princeton-nlp/Mistral-7B-Base-SFT-CPO", MISTRAL, 0.3),
    ("princeton-nlp/Mistral-7B-Base-SFT-RDPO", MISTRAL, 0.3),
    ("princeton-nlp/Mistral-7B-Base-SFT-SimPO", MISTRAL, 0.1),
    ("princeton-nlp/Llama-3-Base-8B-RRHF", LLAMA3, 0.5),
    ("princeton-nlp/Llama-3-Base-8B-SLiC-HF", LLAMA3, 0.5),
    ("princeton-nlp/Llama-3-Base-8B-SFT-IPO", LLAMA3, 0.3),
    ("princeton-nlp/Llama-3-Base-8B-SFT-CPO", LLAMA3, 0.5),
    ("princeton-nlp/Llama-3-Base-8B-SFT-KTO", LLAMA3, 0.4),
    ("princeton-nlp/Llama-3-Base-8B-SFT-RDPO", LLAMA3, 0.5),
    ("princeton-nlp/Llama-3-Base-8B-SFT-SimPO", LLAMA3, 0.4),
    ("princeton-nlp/Llama-3-Instruct-8B-SimPO", "meta-llama/Meta-Llama-3-8B-Instruct", 0.3),
    ("abacusai/Smaug-Llama-3-70B-Instruct", "meta-llama/Meta-Llama-3-70B-Instruct", 0.3),
    ("shenzhi-wang/Llama3-70B-Chinese-Chat", "meta-llama/Meta-Llama-3-70B-Instruct", 0.3),
    ("shenzhi-wang/Llama3-8B-Chinese-Chat", "meta-llama/Meta-Llama-3-8B-Instruct", 0.3),
    ("abacusai/Smaug-34B-v0.1", "jondurbin/bagel-34b-v0.2", 0.3),
    ("m-a-p/neo_7b_instruct_v0.1", "m-a-p/neo_7b_sft_v0.1", 0.3),
    ("UCLA-AGI/Mistral7B-PairRM-SPPO", "mistralai/Mistral-7B-Instruct-v0.2", 0.3),
}
# The authors' results_alpaca/leaderboard.csv: win rate, length-controlled win rate and characters, before and after.
LEADERBOARD = """
LLaMA3-iterative-DPO-final 29.17449 36.00887 1628 32.74046 37.79362 1692
Starling-LM-7B-beta 26.57932 25.75901 2015 29.60085 26.41116 2215
Starling-LM-7B-alpha 14.95556 18.30466 1618 18.17976 19.47417 1821
tulu-2-dpo-13b 11.20146 15.47304 1361 15.55141 17.59140 1649
zephyr-7b-alpha 6.73356 9.96557 1160 10.55935 13.57309 1248
tulu-2-dpo-7b 8.49889 10.20556 1489 11.52922 11.67506 1742
zephyr-7b-beta 10.17499 13.20352 1355 11.06112 14.00121 1405
tulu-2-dpo-70b 15.35612 21.19855 1463 22.98062 25.72331 1738
internlm2-chat-20b 36.08058 24.85328 2591 46.18537 27.22576 3335
internlm2-chat-7b 20.48013 18.26883 2069 28.06782 22.66748 2390
internlm2-chat-1_8b 3.76265 3.99734 1634 5.23179 4.27101 2126
Snorkel-Mistral-PairRM-DPO 24.69537 23.99386 2040 28.84530 26.38786 2262
zephyr_0.05 5.00878 9.08556 863 11.50757 14.72948 1397
zephyr_0.1 5.93913 10.44056 958 17.94947 16.25038 2163
zephyr_0.2 8.58087 12.85148 1125 22.73960 21.30100 2138
zephyr_0.4 12.10008 14.57894 1502 17.72261 16.57080 2119
zephyr-7b-dpo-full 14.74904 17.31787 1570 18.03912 20.16286 1706
"""


def loaded(path: Path) -> Recipe:
    return parse(text_of(path), str(path))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recipe(path: Path) -> None:
    recipe = loaded(path)
    made = outputs(recipe.slices, dict.fromkeys(recipe.models, NAMES))
    found = resolve(recipe, made.tensors)
    assert recipe.notes == made.problems == found.problems == found.notes == ()
    assert len(found.numbers) == len(made.tensors) >= len(NAMES)


@pytest.mark.parametrize("path", SEVERAL, ids=lambda path: path.stem)
def test_recipe_of_several_documents(path: Path) -> None:
    documents = parse_documents(text_of(path), str(path))
    assert len(final(documents)) == 1
    for document in documents:
        made = outputs(document.recipe.slices, dict.fromkeys(document.recipe.models, NAMES))
        assert document.recipe.notes == made.problems == resolve(document.recipe, made.tensors).problems == ()


@pytest.mark.parametrize("path", [*RECIPES, *SEVERAL], ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_comments(path: Path) -> None:
    head, body = path.read_text(encoding="utf-8").split("\n\n", 1)
    assert all(line.startswith("#") for line in head.splitlines())
    how = "boost --recipe" if path.parent.name == "boost" else "merge"
    assert re.search(rf"mergekit-lite {how} {path.relative_to(ROOT)} .*-o ", head, re.DOTALL)
    said: set[str] = set()
    for line in body.splitlines():
        key = re.match(r"[ -]*(\w+):", line)
        if key and "#" in line:
            said.add(key[1])
        elif key and not line.rstrip().endswith(":"):
            # Once said, or said of a line above it in the same entry.
            assert key[1] in said | {"merge_method", "model", "value"}, f"{line!r} has no comment"
    assert max(map(len, [*head.splitlines(), *body.splitlines()])) <= 125


def test_each_method_has_a_recipe() -> None:
    in_methods = {path.stem: loaded(path).merge_method for path in RECIPES if path.parent.name == "methods"}
    thin = {"chat_vector", "ema", "uniform_soup", "wise_ft"}  # also written in terms of others
    assert in_methods.keys() == METHODS.keys() | {"lines", "mixed", "momentum"}
    assert set(in_methods.values()) == METHODS.keys() - thin


def test_lines_is_the_papers_formula() -> None:
    """α + β·(l − 1)/(L − 1) in layer l of L, α outside the layers; with α + β = 1 for one fine-tune."""
    recipe = loaded(ROOT / "recipes/methods/lines.yml")
    found = resolve(recipe, outputs(recipe.slices, dict.fromkeys(recipe.models, NAMES)).tensors)
    alpha, beta, layers = 0.5, 0.5, 32
    for tensor, numbers in zip(NAMES, found.numbers, strict=True):
        at = re.search(r"layers\.(\d+)\.", tensor)
        expected = alpha + beta * int(at[1]) / (layers - 1) if at else alpha
        assert numbers is not None and numbers.per_model[0]["weight"] == pytest.approx(expected), tensor


def test_expo_as_published() -> None:
    recipes = [loaded(path) for path in RECIPES if path.parent.name == "expo"]
    assert {
        (r.slices[0].sources[0].model, r.base_model, r.parameters["alpha"][0].values[0]) for r in recipes
    } == PUBLISHED
    assert len(recipes) == len(PUBLISHED)


def test_figures_of_expo_are_the_authors() -> None:
    rows = {name: list(map(float, figures)) for name, *figures in map(str.split, LEADERBOARD.strip().splitlines())}
    said = {}
    for path in RECIPES:
        head = path.read_text(encoding="utf-8").split("\n\n")[0]
        if path.parent.name == "expo" and "leaderboard.csv)" in head:
            figures = re.search(r"win rate (\S+) -> (\S+), LC (\S+) -> (\S+), (\d+) -> (\d+) characters", head)
            assert figures is not None, path
            won, won_after, lc, lc_after, length, length_after = map(float, figures.groups())
            said[path.stem] = [won, lc, length, won_after, lc_after, length_after]
    assert said.keys() == {name.lower() for name in rows}
    for name, figures in rows.items():
        assert said[name.lower()] == [round(figure, 2) for figure in figures], name


def test_fusechat_and_fuseo1_as_published() -> None:
    first, second = (loaded(ROOT / "recipes/fusechat" / f"fusechat-7b-{name}.yml") for name in ("v1-varm", "v2-sce"))
    assert first.config_source == second.config_source == "openchat/openchat_3.5"
    assert (len(first.models), len(second.models)) == (3, 6)
    assert second.parameters["select_topk"][0].values == (0.1,)
    others = [loaded(path) for path in RECIPES if path.parent.name == "fuseo1"]
    assert len(others) == 5
    assert {(r.merge_method, r.dtype, r.parameters["select_topk"][0].values) for r in others} == {
        ("sce", "bfloat16", (1.0,))
    }
