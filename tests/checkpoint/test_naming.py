"""Names of one model under two namings, by the matcher alone."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lite.checkpoint.naming.matching import match_names

TEXT = {
    "embed_tokens.weight": (64, 32),
    "norm.weight": (32,),
    **{f"layers.{n}.self_attn.{x}_proj.weight": (32, 32) for n in range(2) for x in "qkvo"},
    **{f"layers.{n}.mlp.{x}_proj.weight": (48, 32) for n in range(2) for x in ("up", "gate")},
    **{f"layers.{n}.input_layernorm.weight": (32,) for n in range(2)},
}
TOWER = {
    "patch_embedding.weight": (32, 3, 14, 14),
    **{f"encoder.layers.{n}.self_attn.{x}_proj.weight": (32, 32) for n in range(2) for x in "qkv"},
    **{f"encoder.layers.{n}.layer_norm1.weight": (32,) for n in range(2)},
    "head.attention.in_proj_weight": (96, 32),
}
GPT2 = {
    "wte.weight": (64, 32),
    "ln_f.weight": (32,),
    **{f"h.{n}.attn.c_attn.weight": (32, 96) for n in range(2)},
    **{f"h.{n}.ln_1.weight": (32,) for n in range(2)},
}
HEAD = {"lm_head.weight": (64, 32)}


def under(beginning: str, names: dict) -> dict:
    return {beginning + name: shape for name, shape in names.items()}


def within(wrapper: str, names: dict) -> dict:
    return {name.replace("layers.1.", f"layers.1.{wrapper}"): shape for name, shape in names.items()}


# The same tensors in the same order, under two namings.
NAMINGS = {
    "a vision-language model, old and new": (
        {**under("language_model.model.", TEXT), **under("language_model.", HEAD), **under("vision_tower.", TOWER)},
        {**under("model.language_model.", TEXT), **HEAD, **under("model.vision_tower.", TOWER)},
    ),
    "Qwen-VL, old and new": (
        {**under("model.", TEXT), **HEAD, **under("visual.", TOWER)},
        {**under("model.language_model.", TEXT), **HEAD, **under("model.visual.", TOWER)},
    ),
    "a tower within a tower": (
        {**under("language_model.model.", TEXT), **under("vision_tower.vision_model.", TOWER)},
        {**under("model.language_model.", TEXT), **under("model.vision_tower.", TOWER)},
    ),
    "a language model and its language part": ({**under("model.", TEXT), **HEAD}, under("language_model.model.", TEXT)),
    "a bare model": ({**under("model.", TEXT), **HEAD}, TEXT),
    "a bare model of a family": ({**under("bert.", TOWER), "classifier.weight": (2, 32)}, TOWER),
    "GPT-2": ({**under("transformer.", GPT2), **HEAD}, GPT2),
    "backbone": ({**under("model.", TEXT), **HEAD}, {**under("backbone.", TEXT), **HEAD}),
    "torch.compile": (under("model.", TEXT), under("_orig_mod.model.", TEXT)),
    "DDP of torch.compile": (under("model.", TEXT), under("module._orig_mod.model.", TEXT)),
    "FSDP within layers": (under("model.", TEXT), under("model.", within("_fsdp_wrapped_module.", TEXT))),
    "FSDP in several places": (under("model.", TEXT), under("_fsdp_wrapped_module.model._fsdp_wrapped_module.", TEXT)),
    "a file of a training loop": (under("fc.", {"weight": (4, 4)}), under("net.fc.", {"weight": (4, 4)})),
}


@pytest.mark.parametrize("pair", NAMINGS.values(), ids=NAMINGS)
@pytest.mark.parametrize("turned", [False, True])
def test_one_model_under_two_namings(pair, turned):
    other, own = reversed(pair) if turned else pair
    naming = match_names(own, other)
    assert not naming.unmatched or not naming.lacking  # the smaller model is matched as a whole
    assert len(set(naming.names.values())) == len(own)
    if len(own) == len(other):
        assert naming.names == dict(zip(own, other, strict=True))
    for name, new in naming.names.items():
        assert new not in other or own[name] == other[new]


def test_equal_names_stay():
    assert match_names(TEXT, TEXT | HEAD).names == {name: name for name in TEXT}


def test_two_towers_that_fit_are_refused():
    other = {**under("text_model.", TOWER), **under("vision_model.", TOWER)}
    naming = match_names(under("a.", TOWER), other)
    assert naming.names == {name: name for name in under("a.", TOWER)}
    assert naming.ambiguous == (("a.", "text_model.", "vision_model."),)


def test_the_shape_decides_between_towers():
    other = {**under("text_model.", TOWER), **under("vision_model.", dict.fromkeys(TOWER, (7,)))}
    assert match_names(under("a.", TOWER), other).names == dict(zip(under("a.", TOWER), other, strict=False))


def test_a_head_of_the_shape_of_another_is_not_that_head():
    own, other = TEXT | {"score.dense.weight": (32, 32)}, TEXT | {"pooler.dense.weight": (32, 32)}
    naming = match_names(own, other)
    assert (naming.unmatched, naming.lacking) == (("score.dense.weight",), ("pooler.dense.weight",))


def test_layers_that_only_one_model_has_follow():
    own = under("model.", TEXT | {"layers.2.eh_proj.weight": (32, 64)})
    naming = match_names(own, {**under("model.language_model.", TEXT), "lm_head.bias": (64,)})
    assert naming.names["model.layers.2.eh_proj.weight"] == "model.language_model.layers.2.eh_proj.weight"
    assert naming.unmatched == ("model.layers.2.eh_proj.weight",)


def test_targets_of_an_adapter_need_no_shapes():
    targets = dict.fromkeys(name for name in under("model.language_model.", TEXT) if name.endswith("q_proj.weight"))
    other, _ = NAMINGS["a vision-language model, old and new"]
    renamed = match_names(targets, other).renamed
    assert set(renamed.values()) == {f"language_model.model.layers.{n}.self_attn.q_proj.weight" for n in range(2)}


def test_the_summary_counts_and_names_beginnings():
    other, own = NAMINGS["Qwen-VL, old and new"]
    assert match_names(own, other).summary == (
        f"{len(TEXT) + len(TOWER)} tensors under other names: model.language_model. → model., model. taken off"
    )


COMPONENT = st.sampled_from(["model", "encoder", "layers", "norm", "a", "b", "0", "1", "module"])
NAME = st.lists(COMPONENT, min_size=1, max_size=4).map(lambda parts: ".".join([*parts, "weight"]))
SHAPE = st.sampled_from([(4,), (4, 4), (3, 4)])
MODEL = st.dictionaries(NAME, SHAPE, min_size=1, max_size=12)
BEGINNING = st.lists(COMPONENT.filter(str.isalpha), min_size=1, max_size=2).map(lambda parts: ".".join(parts) + ".")


@settings(max_examples=60)
@given(MODEL, BEGINNING)
def test_a_beginning_put_before_all_names_pairs_the_same_tensors_or_none(model, beginning):
    for own, other in ((under(beginning, model), model), (model, under(beginning, model))):
        naming = match_names(own, other)
        truth = dict(zip(own, other, strict=True))
        for name, new in naming.names.items():
            assert new == truth[name] or new not in other


@settings(max_examples=60)
@given(MODEL, MODEL)
def test_pairs_are_of_one_shape_and_names_stay_different(own, other):
    naming = match_names(own, other)
    assert list(naming.names) == list(own)
    assert len(set(naming.names.values())) == len(own)
    for name, new in naming.renamed.items():
        assert new not in other or own[name] == other[new]
    assert set(naming.lacking) == other.keys() - set(naming.names.values())
