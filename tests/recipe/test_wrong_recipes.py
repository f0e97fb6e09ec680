"""Wrong recipes, and the exact complaint about each: place and wording."""

# ruff: noqa: E501  (a complaint is one line)

from __future__ import annotations

from textwrap import dedent

import pytest

from mergekit_lite.recipe import RecipeError, parse

TAIL = "merge_method: linear\n"
TIES = "merge_method: ties\nbase_model: base\n"
PAIR = "models:\n  - {model: a, parameters: {weight: 1}}\n  - {model: b, parameters: {weight: 1}}\n"
SLICES = TAIL + "parameters: {weight: 1}\nslices:\n"
ROOT_KEYS = (
    "merge_method, models, slices, modules, base_model, parameters, dtype, out_dtype, tokenizer_source, tokenizer, "
    "chat_template, include, exclude, backbone, new_rows, overrides, seed, random_seed, rounding"
)

# (what is tried, the text, every complaint)
WRONG = [
    # --- YAML
    ("empty", "", ["1:1: the recipe is empty: it needs merge_method and models"]),
    ("comment only", "# nothing\n", ["1:1: the recipe is empty: it needs merge_method and models"]),
    ("no YAML", "models: [a\nb: 1", ["2:2: this is not YAML: expected ',' or ']', but got ':'"]),
    ("tab", "models:\n\t- a", ["2:1: this is not YAML: found character '\\t' that cannot start any token"]),
    ("control character", "a: 1\nb: \x07", ["2:4: this is not YAML: the character U+0007 is not allowed"]),
    ("key twice", TAIL + PAIR + TAIL, ["5:1: 'merge_method' is given twice, first in line 1"]),
    ("tag", "a: !!python/object:os.system x", ["1:4: the tag !!python/object:os.system is refused: a recipe is plain text, numbers and lists"]),
    ("own tag", "a: !mine [1]", ["1:4: the tag !mine is refused: a recipe is plain text, numbers and lists"]),
    ("key is a list", "? [a]\n: 1", ["1:3: a key must be text"]),
    ("no alias", "a: *b", ["1:4: this is not YAML: found undefined alias 'b'"]),
    ("alias of itself", "a: &a [*a]", ["1:4: an alias names a value that it is itself a part of"]),
    ("merge of a number", "<<: 3", ["1:5: '<<' takes a mapping, got the number 3"]),
    ("not a number", "a: !!int x", ["1:4: 'x' is not a value of type int"]),
    ("two documents", TAIL + PAIR + "---\n" + TAIL, ["6:1: several documents in one file are for merges, which make a model each: one is wanted here"]),
    # --- the root
    ("a list", "- a", ["1:1: a recipe is a mapping with merge_method and models or slices, got a list"]),
    ("no method", PAIR, ["1:1: the recipe has no 'merge_method'"]),
    ("unknown method", "merge_method: tise\nbase_model: base\n" + PAIR, ["1:15: unknown merge_method 'tise'. Did you mean 'ties'?"]),
    ("method is a list", "merge_method: [ties]\n" + PAIR, ["1:15: 'merge_method' expects text, got a list"]),
    ("misspelt key", TAIL + PAIR + "dytpe: float16\n", ["5:1: unknown key 'dytpe' in the recipe. Did you mean 'dtype'?"]),
    ("unknown key", TAIL + PAIR + "zzz: 1\n", [f"5:1: unknown key 'zzz' in the recipe. Known: {ROOT_KEYS}."]),
    ("no models", TAIL, ["1:1: the recipe has neither 'models' nor 'slices': it needs exactly one of them"]),
    ("both", SLICES + "  - sources: [{model: a, layer_range: [0, 1]}]\nmodels: [{model: a}]\n", ["1:1: the recipe has both 'models' and 'slices': it needs exactly one of them"]),
    ("models is empty", TAIL + "models: []\n", ["2:9: expected a list of models, got an empty list"]),
    ("models is text", TAIL + "models: a\n", ["2:9: expected a list of models, got the text 'a'"]),
    ("modules", TAIL + "modules: {}\n", ["2:10: 'modules' expects a mapping of modules, got an empty mapping"]),
    ("experts", TAIL + PAIR + "gate_mode: hidden\n", ["5:1: 'gate_mode' is of recipes of mixtures (mergekit-moe): mergekit-lite moe RECIPE -o OUT builds them"]),
    ("evolve", TAIL + PAIR + "genome: {}\n", ["5:1: genome: recipes of mergekit-evolve are not supported yet"]),
    ("token is a number", TAIL + PAIR + "tokenizer: {tokens: {x: 1}}\n", ["5:25: expected the token 'x' (a mapping of source, force), got the number 1"]),
    ("padding", TAIL + PAIR + "tokenizer: {width: wide, pad_to_multiple_of: 0}\n", ["5:20: 'width' expects one of base, max, min, got the text 'wide'.", "5:46: 'pad_to_multiple_of' expects a whole number from 1 on, got the number 0"]),
    ("token of a stranger", TAIL + PAIR + "tokenizer: {tokens: {x: {source: z}}}\n", ["5:34: 'source' expects one of the recipe's models, got 'z'."]),
    ("half a token", TAIL + PAIR + "tokenizer: {tokens: {x: {source: {kind: model_token}, force: 1}}}\n", ["5:34: a 'model_token' names a 'model', and a 'token' or a 'token_id' of it", "5:62: 'force' expects true or false, got the number 1"]),
    ("dtype", TAIL + PAIR + "dtype: bfloat61\n", ["5:8: 'dtype' expects one of float64, float32, bfloat16, float16, got the text 'bfloat61'. Did you mean 'bfloat16'?"]),
    ("dtype is a number", TAIL + PAIR + "out_dtype: 16\n", ["5:12: 'out_dtype' expects text, got the number 16: put it in quotes, '16', if it is one"]),
    ("template", TAIL + PAIR + "chat_template: chatlm\n", ["5:16: 'chat_template' expects auto, alpaca, chatml, exaone, llama3, mistral or a Jinja template, got the text 'chatlm'. Did you mean 'chatml'?"]),
    ("seed", TAIL + PAIR + "seed: -1\n", ["5:7: 'seed' expects a whole number from 0 on, got the number -1"]),
    ("two seeds", TAIL + PAIR + "seed: 1\nrandom_seed: 1\n", ["6:14: 'seed' and 'random_seed' are one setting: give one of them"]),
    ("rounding", TAIL + PAIR + "rounding: up\n", ["5:11: 'rounding' expects one of nearest, stochastic, got the text 'up'."]),
    # --- models and slices
    ("model is text", TAIL + "models: [a, b]\n", ["2:10: expected a model (a mapping of model, parameters, statistics, part, rename), got the text 'a'", "2:13: expected a model (a mapping of model, parameters, statistics, part, rename), got the text 'b'"]),
    ("no model", TAIL + "models: [{parameters: {weight: 1}}]\n", ["2:10: a model has no 'model'"]),
    ("model is a number", TAIL + "models: [{model: 7, parameters: {weight: 1}}]\n", ["2:18: 'model' expects text, got the number 7: put it in quotes, '7', if it is one"]),
    ("misspelt parameters", TAIL + "models: [{model: a, paramters: {weight: 1}}]\n", ["2:10: linear needs the parameter 'weight' of 'a'", "2:21: unknown key 'paramters' in a model. Did you mean 'parameters'?"]),
    ("range in models", TAIL + "parameters: {weight: 1}\nmodels: [{model: a, layer_range: [0, 1]}]\n", ["3:21: layer_range is for the sources of slices: 'models' takes all layers of each model"]),
    ("twice", TAIL + "parameters: {weight: 1}\nmodels: [{model: a}, {model: a}]\n", ["3:22: 'a' is listed twice: a model goes in once"]),
    ("no path", TAIL + "models: [{model: {model: {revision: x}}, parameters: {weight: 1}}]\n", ["2:26: 'model' has no 'path'"]),
    ("no sources", SLICES + "  - parameters: {weight: 1}\n", ["4:5: the slice has no 'sources'"]),
    ("no range", SLICES + "  - sources: [{model: a}]\n", ["4:15: a source has no 'layer_range'"]),
    ("range of three", SLICES + "  - sources: [{model: a, layer_range: [0, 1, 2]}]\n", ["4:39: 'layer_range' expects two whole numbers, [first, end], got [0, 1, 2]"]),
    ("range of texts", SLICES + "  - sources: [{model: a, layer_range: 0-8}]\n", ["4:39: 'layer_range' expects two whole numbers, [first, end], got the text '0-8'"]),
    ("empty range", SLICES + "  - sources: [{model: a, layer_range: [8, 8]}]\n", ["4:39: 'layer_range' [8, 8] is empty: the end is not included"]),
    ("negative range", SLICES + "  - sources: [{model: a, layer_range: [-2, 8]}]\n", ["4:39: 'layer_range' starts at -2: layers are counted from 0"]),
    ("uneven", SLICES + "  - sources: [{model: a, layer_range: [0, 8]}, {model: b, layer_range: [0, 9]}]\n", ["4:5: all sources of a slice have the same number of layers, got a [0, 8], b [0, 9]"]),
    ("base with no range", TIES + "parameters: {weight: 1}\nslices:\n  - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [2, 4]}]\n", ["5:5: base_model 'base' is not among the sources and their ranges differ: list it with its own"]),
    # --- methods and their parameters
    ("no base", "merge_method: ties\n" + PAIR, ["1:15: ties needs a base_model"]),
    ("too many", "merge_method: slerp\nbase_model: base\nparameters: {t: 0.5}\nmodels: [{model: a}, {model: b}]\n", ["1:15: slerp merges exactly 1 model besides base_model, got 2"]),
    ("one value beside a model that needs it", "merge_method: slerp\nbase_model: base\nmodels: [{model: a, parameters: {t: 1}}]\n", ["1:15: slerp needs the parameter 't'", "3:34: 't' is one value for all models and has no effect under a model, nor in mergekit: put it under the recipe's 'parameters'"]),
    ("two modules", TAIL + "modules: {default: {models: [{model: a}]}, vision: {modls: [{model: a}]}}\n", ["2:30: linear needs the parameter 'weight' of 'a'", "2:52: the module 'vision' has neither 'models' nor 'slices': it needs exactly one of them", "2:53: unknown key 'modls' in the module 'vision'. Did you mean 'models'?"]),
    ("models in and out of the module", TAIL + PAIR + "modules: {default: {models: [{model: a}]}}\n", ["5:21: 'models' stands in the module and in the recipe: give one", "5:30: linear needs the parameter 'weight' of 'a'"]),
    ("misspelt in the module", TAIL + "modules: {default: {modls: [{model: a}]}}\n", ["1:1: the recipe has neither 'models' nor 'slices': it needs exactly one of them", "2:21: unknown key 'modls' in the recipe. Did you mean 'models'?"]),
    ("too few", "merge_method: model_stock\nbase_model: base\nmodels: [{model: a}]\n", ["1:15: model_stock merges 2 or more models besides base_model, got 1"]),
    ("base as one of one", "merge_method: passthrough\nbase_model: base\nmodels: [{model: a}]\n", ["1:15: passthrough merges exactly 1 model, got 2"]),
    ("misspelt", TIES + "models: [{model: a, parameters: {weight: 1, densty: 1}}]\n", ["3:45: ties takes no parameter 'densty'. Did you mean 'density'?"]),
    ("lacking in one", TIES + "models:\n  - {model: a, parameters: {weight: 1}}\n  - {model: b}\n", ["5:5: ties needs the parameter 'weight' of 'b'"]),
    ("lacking in all", TIES + "models: [{model: a}, {model: b}]\n", ["1:15: ties needs the parameter 'weight' of each model"]),
    ("shared is lacking", "merge_method: expo\nbase_model: sft\nmodels: [{model: a}]\n", ["1:15: expo needs the parameter 'alpha'"]),
    ("base is one of them", TAIL + "base_model: base\n" + PAIR, ["4:3: linear needs the parameter 'weight' of 'base': base_model is one of the models that are merged"]),
    ("parameters is a list", TAIL + PAIR + "parameters: [1]\n", ["5:13: 'parameters' expects a mapping, got a list"]),
    ("no value", TAIL + "models: [{model: a, parameters: {weight: }}]\n", ["2:10: linear needs the parameter 'weight' of 'a'", "2:34: 'weight' has no value"]),
    # --- values
    ("text", TAIL + "models: [{model: a, parameters: {weight: high}}]\n", ["2:42: 'weight' expects a number, got the text 'high'"]),
    ("truth for a number", TAIL + "models: [{model: a, parameters: {weight: true}}]\n", ["2:42: 'weight' expects a number, got true"]),
    ("not finite", TAIL + "models: [{model: a, parameters: {weight: .inf}}]\n", ["2:42: 'weight' expects a number, got the number .inf"]),
    ("number for truth", TIES + PAIR + "parameters: {normalize: 2}\n", ["6:25: 'normalize' expects true or false, got the number 2"]),
    ("fraction for whole", "merge_method: karcher\nmodels: [{model: a}, {model: b}]\nparameters: {max_iter: 2.5}\n", ["3:24: 'max_iter' expects a whole number from 0 on, got the number 2.5"]),
    ("choice", "merge_method: sce\nbase_model: base\nmodels: [{model: a}]\nparameters: {variant: fuse}\n", ["4:23: 'variant' expects one of 'mergekit', 'fusechat', 'paper', got the text 'fuse'"]),
    ("truth or choice", TIES + PAIR + "parameters: {rescale: l2}\n", ["6:23: 'rescale' expects true or false or one of 'l1', 'density', got the text 'l2'"]),
    ("out of bounds", TIES + "models: [{model: a, parameters: {weight: 1, density: 1.7}}]\n", ["3:54: 'density': expected a number from 0 to 1, got 1.7"]),
    ("one of a gradient", TIES + PAIR + "parameters:\n  density:\n    - filter: mlp\n      value: [0.5, -1]\n    - value: 2\n", ["9:20: 'density': expected a number from 0 to 1, got -1", "10:14: 'density': expected a number from 0 to 1, got 2"]),
    ("below zero", "merge_method: nearswap\nbase_model: base\nmodels: [{model: a}]\nparameters: {t: -1}\n", ["4:17: 't': expected a number from 0 on, got -1"]),
    ("tokenizer of a stranger", TAIL + PAIR + "tokenizer_source: c\n", ["5:19: tokenizer_source expects 'base', 'union' or one of the recipe's models, got 'c'."]),
    ("empty gradient", TAIL + "models: [{model: a, parameters: {weight: []}}]\n", ["2:42: 'weight' is an empty list: a gradient has at least one value"]),
    ("text in a gradient", TAIL + "models: [{model: a, parameters: {weight: [0, x]}}]\n", ["2:46: 'weight' expects a number, got the text 'x'"]),
    ("nested gradient", TAIL + "models: [{model: a, parameters: {weight: [[0, 1]]}}]\n", ["2:43: 'weight' expects a number, got a list"]),
    ("values and filters", TAIL + "models: [{model: a, parameters: {weight: [0, {value: 1}]}}]\n", ["2:42: 'weight' mixes values and filters: a list is a gradient, or its entries have 'filter' and 'value'"]),
    ("mixed kinds", TIES + PAIR + "parameters: {rescale: [true, density]}\n", ["6:23: 'rescale' is a gradient of mixed kinds: numbers, truth values or texts alone"]),
    ("filter without value", TAIL + "models: [{model: a, parameters: {weight: [{filter: mlp}]}}]\n", ["2:43: an entry of 'weight' has no 'value'"]),
    ("misspelt filter", TAIL + "models: [{model: a, parameters: {weight: {fliter: mlp, value: 1}}}]\n", ["2:43: unknown key 'fliter' in a filter of 'weight'. Did you mean 'filter'?"]),
    ("old name of filter", TAIL + "models: [{model: a, parameters: {weight: {pattern: mlp, value: 1}}}]\n", ["2:43: unknown key 'pattern' in a filter: it is called 'filter'"]),
    ("value is a mapping", TAIL + "models: [{model: a, parameters: {weight: {value: {value: 1}}}}]\n", ["2:50: 'weight' expects a number, got a mapping"]),
    ("filter is a number", TAIL + "models: [{model: a, parameters: {weight: {filter: 3, value: 1}}}]\n", ["2:51: 'filter' expects text, got the number 3: put it in quotes, '3', if it is one"]),
    ("regex", TAIL + "models: [{model: a, parameters: {weight: {filter: 'regex:(', value: 1}}}]\n", ["2:51: 'regex:(' is no regular expression: missing ), unterminated subpattern at position 0"]),
    ("layers", TAIL + "models: [{model: a, parameters: {weight: {layers: 3, value: 1}}}]\n", ["2:51: 'layers' expects two whole numbers, [first, end], got the number 3"]),
    # --- exclude and overrides
    ("include a number", TAIL + PAIR + "include: [1]\n", ["5:11: 'filter' expects text, got the number 1: put it in quotes, '1', if it is one"]),
    ("new rows", TAIL + PAIR + "new_rows: copi\n", ["5:11: 'new_rows' expects one of refuse, copy, got the text 'copi'. Did you mean 'copy'?"]),
    ("exclude nothing", TAIL + PAIR + "exclude: [{}]\n", ["5:11: the filter has neither 'filter' nor 'layers'"]),
    ("exclude a number", TAIL + PAIR + "exclude: [1]\n", ["5:11: 'filter' expects text, got the number 1: put it in quotes, '1', if it is one"]),
    ("override of all", TAIL + PAIR + "overrides: [{merge_method: linear}]\n", ["5:13: the override has neither 'filter' nor 'layers'"]),
    ("override of nothing", TAIL + PAIR + "overrides: [{filter: norm}]\n", ["5:13: the override has neither 'merge_method' nor 'parameters'"]),
    ("override by an unknown", TAIL + PAIR + "overrides: [{filter: norm, merge_method: liner}]\n", ["5:42: unknown merge_method 'liner'. Did you mean 'linear'?"]),
    ("override lacks a base", TAIL + PAIR + "overrides: [{filter: norm, merge_method: sce}]\n", ["5:13: sce needs a base_model"]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "complaints"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_complaints(text: str, complaints: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(text)
    assert [str(problem) for problem in caught.value.problems] == complaints


def test_all_at_once() -> None:
    text = dedent("""\
        merge_methd: ties
        models:
          - model: a
            parameters: {weight: x}
          - {modle: b}
        dtype: int3
    """)
    with pytest.raises(RecipeError) as caught:
        parse(text, "mine.yml")
    assert caught.value.exit_code == 2
    assert str(caught.value) == dedent("""\
        mine.yml has 5 problems:
          - 1:1: the recipe has no 'merge_method'
          - 1:1: unknown key 'merge_methd' in the recipe. Did you mean 'merge_method'?
          - 5:5: a model has no 'model'
          - 5:6: unknown key 'modle' in a model. Did you mean 'model'?
          - 6:8: 'dtype' expects one of float64, float32, bfloat16, float16, got the text 'int3'.""")


def test_billion_laughs() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30)]
    with pytest.raises(RecipeError, match="more than 100,000 values"):
        parse("\n".join(lines))


def test_nesting() -> None:
    with pytest.raises(RecipeError, match="nested too deeply"):
        parse("[" * 20_000)
