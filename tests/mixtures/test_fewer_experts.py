"""Fewer experts: what is chosen, against naive choices; what is written, against tensors cut and averaged by torch."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from mergekit_lite import merge_experts, prune_experts
from mergekit_lite.checkpoint import open_checkpoint
from mergekit_lite.commands import main
from mergekit_lite.engine.run import run
from mergekit_lite.errors import PlanError, UsageError
from mergekit_lite.mixtures.layers import expert_layers
from mergekit_lite.mixtures.splitting import plan_split
from mergekit_lite.mixtures.thinning import grouping
from mergekit_lite.mixtures.thinning.choosing import checked, chosen_to_keep, chosen_to_merge
from mergekit_lite.mixtures.thinning.fewer import groups_as_text, plan_fewer
from mergekit_lite.mixtures.thinning.similarity import similarities
from mergekit_lite.mixtures.thinning.usage import Usage
from mergekit_lite.verification import verify
from tests.mixtures.tiny import loaded, logits, made, weights

ROLES = ("gate_proj", "up_proj", "down_proj")


def cosines(size: int, seed: int) -> np.ndarray:
    """Return the cosines of random vectors."""
    vectors = np.random.default_rng(seed).normal(size=(size, 5))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors @ vectors.T


def expert(state: dict[str, torch.Tensor], layer: int, number: int) -> torch.Tensor:
    """Return everything that an expert is made of, as one vector."""
    parts = [state[f"model.layers.{layer}.mlp.experts.{number}.{role}.weight"].double().flatten() for role in ROLES]
    return torch.cat(parts)


def test_clusters_are_those_of_average_linkage() -> None:
    """Against the definition: the mean over all pairs, computed anew each time."""
    seed = random.randrange(1000)
    print(f"seed {seed}")
    for size, number in ((7, 3), (12, 4), (9, 8)):
        alike = cosines(size, seed)
        groups = [(n,) for n in range(size)]
        while len(groups) > number:
            pairs = [(alike[np.ix_(a, b)].mean(), a, b) for a in groups for b in groups if a < b]
            _, one, other = max(pairs)
            groups = sorted([*(g for g in groups if g not in (one, other)), tuple(sorted(one + other))])
        assert grouping.clusters(alike, number) == groups


def test_of_twins_one_goes_first() -> None:
    alike = cosines(6, 3)
    alike[4], alike[:, 4] = alike[1], alike[:, 1]
    alike[4, 4] = 1
    assert grouping.least_alike(alike, 5) == (0, 1, 2, 3, 5)
    assert (1, 4) in grouping.clusters(alike, 5)
    assert grouping.most_used([5, 9, 0, 9, 5, 1], 3) == (0, 1, 3)
    assert sorted(sum(grouping.around_most_used([5, 9, 0, 9, 5, 1], alike, 3), ())) == [*range(6)]
    assert any({1, 4} <= {*group} for group in grouping.around_most_used([5, 9, 0, 9, 1, 1], alike, 3))


@pytest.mark.parametrize("layout", ["apart", "together"])
def test_similarities_are_cosines_of_all_weights(layout: str, tmp_path: Path) -> None:
    model = made("qwen3_moe", tmp_path / "m", torch.bfloat16, apart=layout == "apart")
    state = weights(made("qwen3_moe", tmp_path / "apart", torch.bfloat16))
    found = similarities(expert_layers(open_checkpoint(str(model))), "weights")
    for layer in range(2):
        vectors = torch.stack([expert(state, layer, number) for number in range(6)])
        np.testing.assert_allclose(found[layer], _naive(vectors), atol=1e-12)
    rows = state["model.layers.1.mlp.gate.weight"].double()
    found = similarities(expert_layers(open_checkpoint(str(model))), "router")
    np.testing.assert_allclose(found[1], _naive(rows), atol=1e-12)


def _naive(vectors: torch.Tensor) -> np.ndarray:
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    return (unit @ unit.T).numpy()


@pytest.mark.parametrize("layout", ["apart", "together"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v3"])
def test_kept_experts_answer_as_if_the_others_were_never_chosen(kind: str, layout: str, tmp_path: Path) -> None:
    """The second implementation is transformers' own router, which is kept from choosing what was dropped."""
    model = made(kind, tmp_path / "m", apart=layout == "apart")
    layers = [layer.number for layer in expert_layers(open_checkpoint(str(model)))]
    kept = [0, 2, 4, 5] if kind == "deepseek_v3" else [1, 2, 5]
    run(plan_fewer(str(model), {layer: [(number,) for number in kept] for layer in layers}, tmp_path / "out"))
    assert weights(tmp_path / "out").keys() <= weights(model).keys()
    full, small = loaded(model), loaded(tmp_path / "out")
    for layer in layers:
        own, other = full.model.layers[layer].mlp, small.model.layers[layer].mlp
        hidden = torch.randn(1, 9, 16)
        with torch.inference_mode():
            assert torch.equal(own.gate.weight[kept], other.gate.weight)
            _, shares, chosen = other.gate(hidden)
            before = own.experts(hidden[0], torch.tensor(kept)[chosen], shares)
            torch.testing.assert_close(other.experts(hidden[0], chosen, shares), before)
        if kind == "deepseek_v3":
            assert torch.equal(own.gate.e_score_correction_bias[kept], other.gate.e_score_correction_bias)
    logits(tmp_path / "out")
    assert verify(tmp_path / "out", samples="all").findings == ()


@pytest.mark.parametrize("layout", ["apart", "together"])
def test_groups_become_weighted_means(layout: str, tmp_path: Path) -> None:
    model = made("qwen3_moe", tmp_path / "m", torch.bfloat16, apart=layout == "apart")
    groups = {0: [(0, 3), (1,), (2, 4, 5)], 1: [(0,), (1, 2, 3, 4), (5,)]}
    shares = {0: [3, 1, 1, 1, 2, 5], 1: [1, 2, 3, 2, 1, 1]}
    run(plan_fewer(str(model), groups, tmp_path / "out", weights={n: [*map(float, s)] for n, s in shares.items()}))
    state, out = weights(made("qwen3_moe", tmp_path / "apart", torch.bfloat16)), loaded(tmp_path / "out").state_dict()
    for layer, of_layer in groups.items():
        for number, group in enumerate(of_layer):
            total = sum(shares[layer][member] for member in group)
            names = [f"model.layers.{layer}.mlp.experts.{member}.down_proj.weight" for member in group]
            pairs = [*zip(group, names, strict=True)]
            naive = sum(state[name].double() * (shares[layer][member] / total) for member, name in pairs).float()
            assert torch.equal(out[f"model.layers.{layer}.mlp.experts.down_proj"][number].bfloat16(), naive.bfloat16())
            rows = state[f"model.layers.{layer}.mlp.gate.weight"].double()
            row = sum(rows[member] * (shares[layer][member] / total) for member in group).float().bfloat16()
            assert torch.equal(out[f"model.layers.{layer}.mlp.gate.weight"][number].bfloat16(), row)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_local_experts"] == 3
    assert verify(tmp_path / "out", samples="all").findings == ()


def test_where_the_router_chooses_among_groups_each_of_these_is_thinned(tmp_path: Path) -> None:
    model = str(made("deepseek_v3", tmp_path / "m"))
    mixture, layers = checked(model, 4, "weights", False, "moe prune")
    kept = [e for (e,) in chosen_to_keep(mixture, layers, 4, "weights").groups[1]]
    assert sum(e < 3 for e in kept) == sum(e >= 3 for e in kept) == 2
    for group in chosen_to_merge(mixture, layers, 4, "router").groups[1]:
        assert len({member // 3 for member in group}) == 1
    with pytest.raises(PlanError, match="2 groups of equal size"):
        checked(model, 3, "weights", False, "moe prune")
    config = Path(model, "config.json")
    config.write_text(config.read_text().replace('"n_group": 2', '"n_group": 4'))
    with pytest.raises(PlanError, match="its 6 experts are no 4 groups of equal size"):
        checked(model, 4, "weights", False, "moe prune")


def test_what_cannot_be(tmp_path: Path) -> None:
    model = str(made("mixtral", tmp_path / "m"))
    for number in (1, 6):
        with pytest.raises(PlanError, match="each token goes through 2: expected 2 to 5"):
            checked(model, number, "weights", False, "moe prune")
    config = Path(model, "config.json")
    before = config.read_text()
    config.write_text(before.replace('"num_experts_per_tok": 2', '"num_experts_per_tok": 6'))
    with pytest.raises(PlanError, match="1 expert: it has 6, and each token goes through 6: no fewer will do"):
        checked(model, 1, "weights", False, "moe prune")
    config.write_text(before.replace('"num_experts_per_tok": 2', '"num_experts_per_tok": "two"'))
    with pytest.raises(PlanError, match="its config has 'two' as num_experts_per_tok: expected a whole number"):
        checked(model, 3, "weights", False, "moe prune")
    config.write_text(before.replace('"hidden_size": 16', '"hidden_size": [16]'))
    with pytest.raises(PlanError, match="as hidden_size: expected a whole number"):
        plan_split(model, [0], "out")
    config.write_text(before)
    with pytest.raises(UsageError, match="--prompts FILE"):
        checked(model, 3, "usage", False, "moe prune")
    with pytest.raises(UsageError, match=r"layers \[0\][\s\S]*two groups"):
        plan_fewer(model, {0: [(0,), (0,)]}, "out")
    groups = {layer: [(0, 1), (2,)] for layer in range(2)}
    for share in (0.0, float("inf"), float("nan")):
        with pytest.raises(UsageError, match="layer 1: weights are 6 numbers above zero"):
            plan_fewer(model, groups, "out", weights={1: [share, *[1.0] * 5]})


def test_usage_decides_and_weighs(tmp_path: Path) -> None:
    model = str(made("mixtral", tmp_path / "m"))
    usage = Usage({0: (9, 0, 5, 7, 1, 2), 1: (0, 0, 4, 8, 8, 4)}, 24, 3, 0)
    mixture, layers = checked(model, 3, "usage", True, "moe prune")
    choice = chosen_to_keep(mixture, layers, 3, "usage", usage)
    assert choice.groups == {0: [(0,), (2,), (3,)], 1: [(2,), (3,), (4,)]}
    assert choice.rows[0] == ("0", "1, 4, 5", "87.5%")
    merge = chosen_to_merge(mixture, layers, 3, "usage", usage)
    assert merge.weights == {0: [10, 1, 6, 8, 2, 3], 1: [1, 1, 5, 9, 9, 5]}
    assert "24 tokens of 3 prompts" in merge.how


def test_usage_is_what_the_routers_choose_and_padding_is_not_counted(tmp_path: Path) -> None:
    from mergekit_lite.answers.rows import Prompt
    from mergekit_lite.answers.template import ChatTemplate
    from mergekit_lite.mixtures.thinning.usage import measured
    from tests.tokenizers import tokenizer

    model = made("mixtral", tmp_path / "m", vocab_size=400)
    own = tokenizer("chatml")
    own.save_pretrained(model)
    texts = ["one", "one two three four five", "two two", *["is one two?"] * 7]
    prompts = [Prompt(str(n), ({"role": "user", "content": text},)) for n, text in enumerate(texts)]
    usage = measured(open_checkpoint(str(model)), prompts, 6)
    full, rows = loaded(model), [ChatTemplate(own).prompt(prompt.messages) for prompt in prompts]
    naive = {layer: torch.zeros(6, dtype=torch.int64) for layer in range(2)}
    for row in rows:
        with torch.inference_mode():
            for layer, logits_of in enumerate(full(torch.tensor([row]), output_router_logits=True).router_logits):
                naive[layer] += torch.bincount(logits_of.topk(2).indices.flatten(), minlength=6)
    assert usage.counts == {layer: tuple(of.tolist()) for layer, of in naive.items()}
    assert usage.tokens == sum(map(len, rows))
    assert sum(usage.counts[0]) == 2 * usage.tokens


def test_the_commands(tmp_path: Path) -> None:
    from tests.tokenizers import tokenizer

    model, prompts = made("mixtral", tmp_path / "m", vocab_size=400), tmp_path / "prompts.jsonl"
    tokenizer("chatml").save_pretrained(model)
    prompts.write_text('{"prompt": "one two"}\n{"prompt": "three"}\n')
    for command, by in (
        (["prune", "--keep"], ["usage", "--prompts", str(prompts)]),
        (["merge-experts", "--to"], ["weights"]),
    ):
        out = tmp_path / command[0]
        arguments = ["moe", command[0], str(model), command[1], "3", "--by", *by, "-o", str(out), "--json"]
        planned = CliRunner().invoke(main, [*arguments, "--dry-run"])
        assert planned.exit_code == 0, planned.output
        assert not out.exists()
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 0, done.output
        told = json.loads(done.stdout)
        assert told["experts"] == json.loads(planned.stdout)["experts"]
        assert [*told["experts"]] == ["0", "1"]
        recipe = json.loads((out / "mergekit_lite_manifest.json").read_text())["recipe"]
        as_text = {layer: groups_as_text(groups) for layer, groups in told["experts"].items()}
        assert recipe["experts"] == as_text
        card = (out / "README.md").read_text()
        assert "Experts: " in card
        assert "\n- merge\n- moe\n" in card  # tags
        assert "\n| layer | " in card
        again = CliRunner().invoke(main, [*arguments, "--resume"])
        assert again.exit_code == 0, again.output  # it is finished, and the same
        assert verify(out, samples="all").findings == ()
    merge_experts(str(model), str(tmp_path / "python"), 3, "weights")
    of_python, of_command = weights(tmp_path / "python"), weights(tmp_path / "merge-experts")
    assert all(torch.equal(of_python[name], of_command[name]) for name in of_command)
    prune_experts(str(model), str(tmp_path / "pruned"), 3, "usage", prompts=["one two", "three"])
    of_python, of_command = weights(tmp_path / "pruned"), weights(tmp_path / "prune")
    assert all(torch.equal(of_python[name], of_command[name]) for name in of_command)
    prune_experts(model, tmp_path / "of-paths", 3, "router")
    assert verify(tmp_path / "of-paths", samples="all").findings == ()
    with pytest.raises(UsageError, match=r"by should be one of usage, weights, router, got 'uage'.*'usage'"):
        prune_experts(model, tmp_path / "x", 3, "uage")
    refused = CliRunner().invoke(main, ["moe", "prune", str(model), "--keep", "3", "--by", "usage", "-o", "x"])
    assert refused.exit_code == 2


def test_a_forged_manifest_is_a_finding(tmp_path: Path) -> None:
    model, out = made("qwen3_moe", tmp_path / "m"), tmp_path / "out"
    run(plan_fewer(str(model), {layer: [(0,), (2,)] for layer in range(2)}, out))
    manifest = out / "mergekit_lite_manifest.json"
    written = manifest.read_text()
    for before, forged in (("0 2", "0 9"), ("0 2", "0 2; rm"), ("moe prune", "moe purge")):
        manifest.write_text(written.replace(f'"{before}"', f'"{forged}"'))
        findings = [finding.what for finding in verify(out, samples="all").findings]
        assert any("give no plan" in what for what in findings), findings
