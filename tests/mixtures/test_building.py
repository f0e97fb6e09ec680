"""Mixtures: equal experts are the dense model, others are what the formula says; files, configs, digests, refusals."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import mergekit_lite
from mergekit_lite import draws
from mergekit_lite.commands import main
from mergekit_lite.errors import MergekitLiteError, PlanError, UsageError
from mergekit_lite.mixtures.building.building import build_moe, plan_moe
from mergekit_lite.mixtures.building.dense import families_named
from mergekit_lite.mixtures.families import FAMILIES
from mergekit_lite.mixtures.splitting import plan_split
from mergekit_lite.ops import c_ops
from mergekit_lite.transplanting.planning import plan_transplant
from mergekit_lite.vectors.extraction import extract_vector
from tests.mixtures.models import HIDDEN, LAYERS, Mixture, dense_model, loaded, logits, write
from tests.models import read_folder, same_bytes, tree_bytes

CLOSE = {"rtol": 1e-4, "atol": 2e-5}
MADE = [  # dense, architecture, type of the output
    ("llama", "mixtral", "mixtral"),
    ("mistral", "mixtral", "mixtral"),
    ("qwen3", "qwen3", "qwen3_moe"),
    ("olmo2", "flexolmo", "flex_olmo"),
]
SHARING = [("llama", False), ("llama", True), ("mistral", False), ("qwen2", True)]  # what Qwen2-MoE is made from


def recipe(*experts: Any, **more: Any) -> dict[str, Any]:
    """A recipe of models a, b …, or of entries in full."""
    listed = [{"source_model": each} if isinstance(each, str) else each for each in experts]
    return {"base_model": "a", "gate_mode": "random", "experts": listed} | more


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("kind", "architecture", "output"), MADE, ids=[made[0] for made in MADE])
def test_equal_experts_are_the_dense_model(kind: str, architecture: str, output: str, tied: bool) -> None:
    """For any router: the weights of the chosen experts sum to 1. The router is random, and not small."""
    model = dense_model(kind, 1, tied=tied)
    write(model, Path("a"))
    build_moe(recipe("a", "a", "a", architecture=architecture), "out")
    made = loaded(Path("out"))
    assert made.config.model_type == output
    torch.testing.assert_close(logits(made), logits(model), **CLOSE)
    assert made.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False).shape == (1, 5)
    assert (made.lm_head.weight.data_ptr() == made.model.embed_tokens.weight.data_ptr()) is tied


@pytest.mark.parametrize(("kind", "tied"), SHARING)
def test_a_shared_expert_is_added(kind: str, tied: bool) -> None:
    """Qwen2-MoE: experts that are distinct, and a shared one that is neither base nor expert, and wider."""
    models = {name: dense_model(kind, seed, tied=tied) for seed, name in enumerate("abc")}
    models["s"] = dense_model(kind, 7, tied=tied, intermediate_size=96)
    for name, model in models.items():
        write(model, Path(name))
    asked = recipe(
        "a", "b", "c", shared_experts=[{"source_model": "s"}], gate_mode="uniform_random", architecture="qwen"
    )
    build_moe(asked, "out")
    written, made = read_folder(Path("out")), loaded(Path("out"))
    assert made.config.model_type == "qwen2_moe"
    wanted = copy.deepcopy(models["a"])
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}.mlp"
        wanted.model.layers[layer].mlp = Mixture(
            written[f"{prefix}.gate.weight"],
            [models[name].model.layers[layer].mlp for name in "abc"],
            2,
            models["s"].model.layers[layer].mlp,
            written[f"{prefix}.shared_expert_gate.weight"][0],
        )
    torch.testing.assert_close(logits(made), logits(wanted), **CLOSE)
    biases = [tensor for name, tensor in written.items() if name.endswith("k_proj.bias")]
    assert len(biases) == LAYERS
    assert all(bool(tensor.any()) == (kind == "qwen2") for tensor in biases)
    notes = plan_moe(asked, "other").plan.notes
    assert ["they are zeros" in note for note in notes] == ([] if kind == "qwen2" else [True])


def test_distinct_experts_are_chosen_and_scaled() -> None:
    """One expert a token, and (W + noise) · residual_scale in float32, rounded once."""
    models = {name: dense_model("llama", seed) for seed, name in enumerate("abc")}
    for name, model in models.items():
        write(model, Path(name))
    b = {"source_model": "b", "residual_scale": 0.5}
    c = {"source_model": "c", "residual_scale": -2, "noise_scale": 0.125}
    build_moe(recipe(b, c, experts_per_token=1), "out")
    written, made = read_folder(Path("out")), loaded(Path("out"))
    wanted = copy.deepcopy(models["a"])
    noises = []
    for layer in range(LAYERS):
        experts = []
        for number, (name, scale) in enumerate((("b", 0.5), ("c", -2.0))):
            expert = copy.deepcopy(models[name].model.layers[layer].mlp)
            prefix = f"model.layers.{layer}.block_sparse_moe.experts.{number}"
            for ours, theirs in (("w1", expert.gate_proj), ("w3", expert.up_proj), ("w2", expert.down_proj)):
                factor = scale if ours == "w2" else 1.0
                if number == 0:
                    assert torch.equal(written[f"{prefix}.{ours}.weight"], theirs.weight * factor)
                else:
                    noises.append((written[f"{prefix}.{ours}.weight"] / factor - theirs.weight).flatten())
                theirs.weight.data = written[f"{prefix}.{ours}.weight"]
            experts.append(expert)
        router = written[f"model.layers.{layer}.block_sparse_moe.gate.weight"]
        wanted.model.layers[layer].mlp = Mixture(router, experts, 1)
    torch.testing.assert_close(logits(made), logits(wanted), **CLOSE)
    drawn = torch.cat(noises).detach()  # of N(0, 1/8)
    assert abs(float(drawn.mean())) < 4 * 0.125 / len(drawn) ** 0.5
    assert abs(float(drawn.std()) / 0.125 - 1) < 4 / (2 * len(drawn)) ** 0.5
    assert abs(float((drawn.abs() < 0.125).double().mean()) - 0.6827) < 0.02
    assert len(drawn.unique()) > 0.98 * len(drawn)


def test_deepseek_adds_any_number_of_shared_experts() -> None:
    """Its first version is known to no transformers: tensors by their published names, and the formula on them."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    models = {name: dense_model("llama", seed) for seed, name in enumerate("abcd")}
    for name, model in models.items():
        write(model, Path(name))
    shared = [{"source_model": "c", "residual_scale": 0.25}, {"source_model": "d"}]
    build_moe(recipe("a", "b", shared_experts=shared, architecture="deepseek"), "out")
    written, config = read_folder(Path("out")), json.loads(Path("out/config.json").read_text())
    assert config["n_routed_experts"] == 2
    assert config["n_shared_experts"] == 2
    assert config["architectures"] == ["DeepseekForCausalLM"]
    assert config["moe_intermediate_size"] == 2 * HIDDEN
    assert config["scoring_func"] == "softmax"
    assert config["norm_topk_prob"] is True
    assert config["first_k_dense_replace"] == 0
    wide = LlamaMLP(type(models["a"].config)(hidden_size=HIDDEN, intermediate_size=4 * HIDDEN))
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}.mlp"
        wide.load_state_dict({f"{role}_proj.weight": written[f"{prefix}.shared_experts.{role}_proj.weight"]
                              for role in ("gate", "up", "down")})  # fmt: skip
        x = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(layer))
        c, d = (models[name].model.layers[layer].mlp for name in "cd")
        with torch.no_grad():
            torch.testing.assert_close(wide(x), c(x) * 0.25 + d(x), **CLOSE)
        for number, name in enumerate("ab"):
            for role in ("gate", "up", "down"):
                own = models[name].model.layers[layer].mlp.get_submodule(f"{role}_proj").weight
                assert torch.equal(written[f"{prefix}.experts.{number}.{role}_proj.weight"], own)
        assert written[f"{prefix}.gate.weight"].shape == (2, HIDDEN)
    plain = {name for name in models["a"].state_dict() if ".mlp." not in name}
    assert {name for name in written if ".mlp." not in name} == plain


@pytest.mark.parametrize(
    "plan",
    [
        lambda: plan_moe(recipe("a", "b"), "out.gguf"),
        lambda: plan_split("m", [0], "out.gguf"),
        lambda: plan_transplant("a", "b", "out.gguf"),
        lambda: extract_vector("a", "b", "v.gguf"),
    ],
    ids=["moe", "split", "transplant", "extract"],
)
def test_no_output_is_a_gguf(plan: Callable[[], object]) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        write(dense_model("llama", seed), Path(name))
    build_moe(recipe("a", "b"), "m")
    with pytest.raises(UsageError, match=r"\.gguf: GGUF is read, but not written\. Name a folder"):
        plan()


def test_random_rows_have_the_spread_that_they_promise() -> None:
    for name, seed in (("a", 0), ("b", 1)):
        write(dense_model("llama", seed), Path(name))
    for mode, spread in (("random", 1.0), ("uniform_random", (3 * HIDDEN) ** -0.5)):
        build_moe(recipe(*"ababababab", gate_mode=mode), mode)
        written = read_folder(Path(mode))
        rows = torch.cat([written[f"model.layers.{n}.block_sparse_moe.gate.weight"].flatten() for n in range(LAYERS)])
        assert len(rows.unique()) == len(rows)
        assert abs(float(rows.std()) / spread - 1) < 0.12
        assert mode == "random" or float(rows.abs().max()) <= HIDDEN**-0.5
    build_moe(recipe(*"ababababab", seed=1), "other")
    name = "model.layers.0.block_sparse_moe.gate.weight"
    assert not torch.equal(read_folder(Path("other"))[name], read_folder(Path("random"))[name])
    build_moe(recipe(*"ababababab"), "again", threads=1)
    assert tree_bytes(Path("again")) | {"README.md": b""} == tree_bytes(Path("random")) | {"README.md": b""}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_random_rows_are_what_torch_makes_of_the_draws_and_need_no_torch(dtype: str) -> None:
    kind = getattr(torch, dtype)
    for name, seed in (("a", 0), ("b", 1)):
        write(dense_model("llama", seed).to(kind), Path(name))
    Path("moe.json").write_text(json.dumps(recipe("a", "b", seed=7)))
    code = (
        "import sys; from mergekit_lite.commands import main\n"
        "main(['moe', 'moe.json', '-o', 'out', '-q'], standalone_mode=False); print('torch' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    imported = told.strip() == "True"
    assert imported is (dtype == "float32" or c_ops.compiled() is None)
    for name, rows in read_folder(Path("out")).items():
        if name.endswith("gate.weight"):
            drawn = [draws.bits(draws.stream_key(7, name, stream), 0, rows.numel()) for stream in (1, 2)]
            radius, angle = ((each.double() + 2**31 + 0.5) / 2**32 for each in drawn)
            normal = (radius.log() * -2).sqrt() * (angle * 2 * math.pi).cos()
            torch.testing.assert_close(rows.flatten(), normal.float().to(kind), rtol=1e-6, atol=0)


def test_16_bit_weights_are_copied_to_the_bit_and_dtype_is_the_bases() -> None:
    a = dense_model("llama", 0).to(torch.bfloat16)
    write(a, Path("a"), "chatml")
    write(dense_model("llama", 1).to(torch.float16), Path("b"))
    planned = plan_moe(recipe("a", "b"), "out").plan
    assert any("float16 is cast to bfloat16" in note for note in planned.notes)
    assert {name for model, name, _ in planned.left_out if model == "a"} == set()
    assert all(".mlp." not in name for model, name, _ in planned.left_out)
    build_moe(recipe("a", "b"), "out")
    written = read_folder(Path("out"))
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    for name, tensor in a.state_dict().items():
        renamed = name
        for theirs, ours in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
            renamed = renamed.replace(f"mlp.{theirs}", f"block_sparse_moe.experts.0.{ours}")
        assert same_bytes(written[renamed], tensor)
    there = {path.name for path in Path("out").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md"} <= there
    build_moe(recipe("a", "b", dtype="float32"), "wide")
    assert {tensor.dtype for tensor in read_folder(Path("wide")).values()} == {torch.float32}
    assert json.loads(Path("wide/config.json").read_text())["dtype"] == "float32"


def test_what_a_config_leaves_out_is_said() -> None:
    """An old llama's config lacks keys whose defaults differ: rope_theta, heads, the number of positions."""
    from transformers import AutoConfig

    write(dense_model("llama", 0), Path("a"))
    path = Path("a/config.json")
    content = json.loads(path.read_text())
    kept = ("architectures", "model_type", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "vocab_size")  # fmt: skip
    path.write_text(json.dumps({key: content[key] for key in kept} | {"num_key_value_heads": None, "head_dim": None}))
    build_moe(recipe("a", "a"), "out")
    one, two = AutoConfig.from_pretrained("a"), AutoConfig.from_pretrained("out")
    same = ("rope_parameters", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "hidden_act",
            "bos_token_id", "eos_token_id", "tie_word_embeddings")  # fmt: skip
    assert {key: getattr(one, key) for key in same} == {key: getattr(two, key) for key in same}
    assert two.sliding_window is None
    build_moe(recipe("a", "a", architecture="qwen2_moe", shared_experts=[{"source_model": "a"}]), "qwen")
    three = loaded(Path("qwen")).config
    assert {key: getattr(one, key) for key in same} == {key: getattr(three, key) for key in same}


def test_a_window_of_some_layers_is_kept_where_it_can_be() -> None:
    local = ["full_attention", "sliding_attention"]
    settings = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "layer_types": local}
    model = dense_model("qwen2", 0, **settings)
    write(model, Path("a"))
    shared = [{"source_model": "a", "residual_scale": 0.0}]
    build_moe(recipe("a", "a", shared_experts=shared), "out")
    torch.testing.assert_close(logits(loaded(Path("out"))), logits(model), **CLOSE)
    write(dense_model("qwen3", 0, **settings), Path("q"))
    (note,) = plan_moe(recipe("q", "q", base_model="q"), "other").plan.notes[1:]
    assert note.startswith("1 of 2 layers of the base look back 4 tokens")


def test_verify_makes_it_again_and_finds_what_changed() -> None:
    for name, seed in (("a", 0), ("b", 1)):
        write(dense_model("llama", seed), Path(name), "chatml")
    prompted = [{"source_model": name, "positive_prompts": [text], "noise_scale": 0.01}
                for name, text in (("a", "one two"), ("b", "user system"))]  # fmt: skip
    build_moe(recipe(*prompted, gate_mode="cheap_embed"), "out")
    assert mergekit_lite.verify("out", samples="all").findings == ()
    path = Path("out/model.safetensors")
    content = bytearray(path.read_bytes())
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    begin = header["model.layers.1.block_sparse_moe.gate.weight"]["data_offsets"][0]
    content[8 + int.from_bytes(content[:8], "little") + begin] ^= 1
    path.write_bytes(content)
    found = mergekit_lite.verify("out", samples="all").findings
    assert {finding.tensor for finding in found} >= {"model.layers.1.block_sparse_moe.gate.weight"}


def test_every_problem_is_told_before_a_weight_is_read() -> None:
    write(dense_model("llama", 0), Path("a"))
    write(dense_model("llama", 1, intermediate_size=48), Path("b"))
    write(dense_model("gemma2", 1), Path("g"))
    (Path("out")).mkdir()
    for asked, said in (
        (recipe("a", "g"), "g is of type gemma2: Mixtral is made from llama, mistral"),
        (recipe("g", "g", base_model="g"), "g is of type gemma2: mixtures are made as Mixtral from llama, mistral"),
        (recipe("a", "b"), "b: its MLPs are 48 wide, those of a 64"),
        (recipe("a", "a", architecture="qwen3"), "a is of type llama: mixtures are made as Qwen3 MoE from qwen3"),
        (recipe("a", "a", architecture="qwen"), "Qwen MoE has exactly one shared expert, got 0"),
        (recipe("a", "a", architecture="mixtral", shared_experts=[{"source_model": "a"}]), "has no shared experts"),
    ):
        with pytest.raises(PlanError) as refused:
            plan_moe(asked, "other")
        assert said in str(refused.value)
    tensors = dense_model("llama", 0, attention_bias=True)
    write(tensors, Path("biased"))
    with pytest.raises(PlanError) as refused:
        plan_moe(recipe("biased", "biased", base_model="biased"), "other")
    assert "model.layers.1.self_attn.o_proj.bias has no place in Mixtral" in str(refused.value)
    write(dense_model("llama", 1, mlp_bias=True), Path("with-bias"))
    with pytest.raises(PlanError) as refused:
        plan_moe(recipe("a", "with-bias"), "other")
    assert "with-bias: model.layers.1.mlp.down_proj.bias has no place in Mixtral" in str(refused.value)
    assert not Path("other").exists()


def test_shared_experts_of_other_dtypes_lose_nothing() -> None:
    models = {name: dense_model("llama", seed).to(dtype) for seed, (name, dtype) in
              enumerate({"a": torch.float32, "b": torch.float64, "c": torch.bfloat16}.items())}  # fmt: skip
    for name, model in models.items():
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.mul_(1 + 2**-40)  # what float32 can't hold
        write(model, Path(name))
    shared = [{"source_model": name} for name in "bc"]
    build_moe(recipe("a", "a", shared_experts=shared, architecture="deepseek", dtype="float64"), "out")
    out, layer = read_folder(Path("out")), "model.layers.1.mlp"
    for role, dim in (("gate_proj", 0), ("down_proj", 1)):
        own = [models[name].state_dict()[f"{layer}.{role}.weight"].double() for name in "bc"]
        assert torch.equal(out[f"{layer}.shared_experts.{role}.weight"], torch.cat(own, dim))


def test_a_config_whose_numbers_are_none_is_told() -> None:
    write(dense_model("llama", 0), Path("a"))
    config = json.loads(Path("a/config.json").read_text())
    for change, said in (
        ({"hidden_size": "32"}, "its config has '32' as hidden_size: expected a whole number"),
        ({"num_attention_heads": None, "head_dim": -8}, "its config has -8 as head_dim: expected a whole number"),
        ({"num_attention_heads": None}, "its config has no num_attention_heads"),
        ({"num_hidden_layers": 10**12}, "its config has 1,000,000,000,000 layers, and it has 21 tensors"),
    ):
        Path("a/config.json").write_text(json.dumps(config | change))
        with pytest.raises(PlanError) as refused:
            plan_moe(recipe("a", "a"), "other")
        assert f"a: {said}" in str(refused.value)


def test_architectures_are_named_as_in_mergekit() -> None:
    names = {word: [family.title for family in families_named(word)] for word in
             ("mixtral", "Mixtral", "deepseek", "qwen", "qwen3", "qwen2_moe", "DeepSeek MoE", "nothing")}  # fmt: skip
    assert names == {
        "mixtral": ["Mixtral"], "Mixtral": ["Mixtral"], "deepseek": ["DeepSeek MoE"],
        "qwen": ["Qwen MoE", "Qwen3 MoE"], "qwen3": ["Qwen3 MoE"], "qwen2_moe": ["Qwen MoE"],
        "DeepSeek MoE": ["DeepSeek MoE"], "nothing": [],
    }  # fmt: skip
    assert all(family.made_from for family in families_named(None))
    assert FAMILIES["olmoe"] not in families_named(None)


def test_the_command_builds_resumes_and_names_the_nearest() -> None:
    for name, seed in (("a", 0), ("b", 1)):
        write(dense_model("llama", seed), Path(name))
    Path("r.yml").write_text("base_model: a\ngate_mode: random\nexperts: [{source_model: a}, {source_model: b}]\n")
    shown = CliRunner().invoke(main, ["moe", "r.yml", "-o", "out", "--dry-run", "--json"])
    assert shown.exit_code == 0, shown.output
    assert not Path("out").exists()
    made = CliRunner().invoke(main, ["moe", "r.yml", "-o", "out"])
    assert made.exit_code == 0, made.output
    assert mergekit_lite.verify("out", samples="all").findings == ()
    assert "\n- merge\n- moe\n" in Path("out/README.md").read_text()  # tags
    assert CliRunner().invoke(main, ["moe", "build", "-q", "r.yml", "other"]).exit_code == 0
    assert tree_bytes(Path("out")).keys() == tree_bytes(Path("other")).keys()
    wrong = CliRunner().invoke(main, ["moe", "nothing.yml", "-o", "x"])
    assert (wrong.exit_code, "no such recipe" in wrong.output) == (2, True)
    Path("bad.yml").write_text("base_model: a\ngate_mode: hiden\nexperts: [{source_model: gone}]\n")
    wrong = CliRunner().invoke(main, ["moe", "bad.yml", "-o", "x"])
    assert wrong.exit_code == 2
    assert "2:12: 'gate_mode' expects one of" in wrong.output
    assert "Did you mean 'hidden'?" in wrong.output
    with pytest.raises(MergekitLiteError):
        build_moe("r.yml", "out")
