"""The recipes of the published methods load, plan, and have the published numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mergekit_lite.distillation.on_policy.checks import check
from mergekit_lite.distillation.on_policy.rounds import planned
from mergekit_lite.distillation.recipe.checks import pairing_problems
from mergekit_lite.distillation.recipe.loading import load
from mergekit_lite.distillation.rounds import round_of
from mergekit_lite.distillation.training.preference_stage import objective_of
from mergekit_lite.recipe import parse

FOLDER = Path(__file__).parents[2] / "recipes" / "distill"
FILES = sorted(FOLDER.glob("*.yaml"))
FUSECHAT = [file for file in FILES if file.name.startswith("fusechat-3.0")]
PUBLISHED = {  # learning rates of SFT and preference, objective, beta
    "llama-3.1-8b": (5e-6, 8e-7, "dpo_norm", 10),
    "llama-3.2-3b": (5e-6, 1e-6, "dpo_norm", 10),
    "llama-3.2-1b": (5e-6, 1e-6, "dpo_norm", 10),
    "qwen2.5-7b": (2e-6, 3e-7, "dpo", 0.01),
    "gemma-2-9b": (2e-6, 5e-7, "dpo", 0.01),
}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_plans(file: Path) -> None:
    """Nothing is wrong, every prompt has who answers and who judges, and what it makes is in a folder of its name."""
    recipe = load(file)
    assert recipe.folder == FOLDER / file.stem
    domains = {prompts.domain for prompts in recipe.prompts}
    assert list(pairing_problems(recipe, domains)) == []
    assert {*recipe.pairs.domains} <= domains
    for domain in domains:
        own = [recipe.target_source] if recipe.target_source is not None else []
        asked = (*recipe.sources, *recipe.teachers, *own)
        assert any(each.domains is None or domain in each.domains for each in asked), domain
    held_out = {prompts.domain for prompts in recipe.report.prompts}
    assert all(scorer.domains is None or held_out <= set(scorer.domains) for scorer in recipe.scorers[:1])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_is_commented(file: Path) -> None:
    """The first lines say how to run it, and each key has a comment where it first stands."""
    text = file.read_text()
    assert f"mergekit-lite distill run recipes/distill/{file.name}" in text.split("\n\n")[0]
    explained: set[str] = set()
    lines = text.splitlines()
    for number, line in enumerate(lines):
        key = re.match(r"[ -]*([a-z_]+):", line)
        if key is None or key[1] in explained:
            continue
        section = re.search(r":( &\w+)?$", line)
        assert "#" in line or section is not None, f"{file.name}:{number + 1}: {line}"
        explained.add(key[1])


def test_wrpo() -> None:
    recipe = load(FOLDER / "wrpo-llama-3-8b.yaml")
    assert len(recipe.sources) == 10 and len({source.model for source in recipe.sources}) == 10
    assert {source.samples for source in recipe.sources} == {5}
    assert {(one.sampling.temperature, one.sampling.top_p) for one in recipe.sources} == {(0.8, 0.95)}
    assert recipe.pairs.needs_target
    sft, preference = recipe.train.sft, recipe.train.preference
    assert sft is not None and preference is not None
    assert (sft.learning_rate, preference.learning_rate) == (7e-6, 3e-7)
    assert preference.options == {"beta": 0.01, "alpha": 0.1, "schedule": "linear"}
    for stage, accumulated in ((sft, 2), (preference, 8)):
        assert (stage.batch_size, stage.epochs, stage.warmup_ratio) == (128, 1, 0.1)
        assert stage.per_device_batch_size * accumulated * 8 == stage.batch_size  # on the 8 GPUs it was published for


@pytest.mark.parametrize("file", FUSECHAT, ids=lambda file: file.stem)
def test_fusechat(file: Path) -> None:
    recipe = load(file)
    sft, preference = recipe.train.sft, recipe.train.preference
    assert sft is not None and preference is not None
    found = (sft.learning_rate, preference.learning_rate, preference.objective, preference.options["beta"])
    assert found == PUBLISHED[file.stem.removeprefix("fusechat-3.0-")]
    assert (sft.epochs, preference.epochs) == (3, 1)
    maths, code = recipe.pairs.of("openmath"), recipe.pairs.of("leetcode")
    assert (maths.gap, code.gap) == ((0.01, 0.1), (None, None))
    assert (maths.split, code.split, recipe.pairs.of("magpie").split) == ("availability", "availability", "share")
    qwen = next(source for source in recipe.sources if source.name == "qwen2.5-72b")
    assert (qwen.sampling.temperature, qwen.sampling.top_p, qwen.sampling.repetition_penalty) == (0.7, 0.8, 1.05)


def test_fusechat_targets_learn_from_the_same() -> None:
    assert len(FUSECHAT) == len(PUBLISHED)
    own = {"folder", "target", "train"}
    shared = [load(file).model_dump(exclude=own) for file in FUSECHAT]
    assert all(one == shared[0] for one in shared)


def test_fusechat_by_distributions() -> None:
    recipe = load(FOLDER / "fusechat-7b.yaml")
    fuse = recipe.train.fuse
    assert fuse is not None and fuse.pairwise is not None
    assert len(recipe.teachers) == 6 and recipe.teachers[0].model == recipe.target
    published = (fuse.objective, fuse.combine, fuse.clm, fuse.learning_rate, fuse.epochs, fuse.warmup_ratio)
    assert published == ("cross_entropy", "min_ce", 0.9, 5e-6, 3, 0.03)
    assert fuse.per_device_batch_size * 4 * 8 == fuse.batch_size == 128
    assert fuse.trainer == {"adam_beta2": 0.999, "weight_decay": 0.0, "max_grad_norm": 1.0}
    merged = parse((FOLDER.parent / "fusechat" / "fusechat-7b-v2-sce.yml").read_text())
    assert (merged.merge_method, fuse.pairwise.parameters) == (
        fuse.pairwise.merge_method,
        {"select_topk": 0.1, "variant": "fusechat"},
    )


def test_fusellm() -> None:
    recipe = load(FOLDER / "fusellm-7b.yaml")
    fuse = recipe.train.fuse
    assert fuse is not None and fuse.pairwise is None
    assert [teacher.name for teacher in recipe.teachers] == ["llama-2", "openllama", "mpt"]
    assert {teacher.top for teacher in recipe.teachers} == {fuse.options["top"]} == {10}
    assert recipe.teachers[0].model == recipe.target
    published = (fuse.objective, fuse.combine, fuse.clm, fuse.learning_rate, fuse.epochs, fuse.warmup_ratio)
    assert published == ("cross_entropy", "min_ce", 0.9, 1e-5, 1, 0.008)
    assert fuse.per_device_batch_size * 16 * 8 == fuse.batch_size == 128
    assert fuse.trainer == {"adam_beta2": 0.95, "weight_decay": 0.1, "max_grad_norm": 1.0}


def test_on_policy() -> None:
    recipe = load(FOLDER / "on-policy.yaml")
    settings = recipe.train.on_policy
    assert settings is not None and check(recipe) == []
    assert (settings.prompts, settings.samples, settings.sampling.max_tokens) == (512, 4, 4096)
    assert (settings.sampling.temperature, settings.sampling.top_p, settings.coef, settings.clip) == (1, 1, 1, None)
    assert settings.lora is not None and (settings.lora.rank, settings.learning_rate) == (128, 1e-4)
    assert planned(settings, 103_000).steps == 1  # a round


ROUNDS = {  # objective, its options, learning rate, rounds, own answers, momentum, replay, reference
    "iterative-dpo": ("dpo", {"beta": 0.1, "smoothing": 0.1}, 5e-7, 3, 4, 0, (), "start"),
    "sppo": ("sppo", {"beta": 0.001}, 5e-7, 3, 5, 0, (), "start"),
    "apo": ("dpo", {"beta": 0.1}, 5e-7, 3, 5, 0.3, (), "start"),
    "ilr-dpo": ("rdpo", {"beta": 0.1, "alpha": 0.02}, 5e-7, 3, 8, 0, (), "start"),
    "dno": ("dpo", {"beta": 0.1}, 5e-7, 3, 5, 0, (0.3, 0.15), "start"),
    "selm": ("selm", {"beta": 0.01, "alpha": 0.001}, 5e-7, 4, 1, 0, (), "start"),
    "inpo": ("inpo", {"eta": 0.005, "ratio": 1 / 3}, 5e-7, 3, 8, 0, (), "first"),
}


def test_every_recipe_of_rounds_is_listed() -> None:
    assert {file.stem for file in FILES if load(file).rounds is not None} == ROUNDS.keys()


@pytest.mark.parametrize("name", ROUNDS)
def test_rounds(name: str) -> None:
    recipe = load(FOLDER / f"{name}.yaml")
    rounds, preference, own = recipe.rounds, recipe.train.preference, recipe.target_source
    assert rounds is not None and preference is not None and own is not None
    chosen = (preference.objective, preference.options, preference.learning_rate)
    assert (*chosen, rounds.number, own.samples, rounds.momentum, rounds.replay, rounds.reference) == ROUNDS[name]
    problems: list[str] = []
    objective_of(preference, problems)
    assert problems == []
    second = round_of(recipe, 2)
    assert second.target == str(FOLDER / name / "round-1" / ("momentum" if rounds.momentum else "train/preference"))
    assert second.train.preference is not None
    assert second.train.preference.reference == (recipe.target if rounds.reference == "first" else None)


def test_dno_filters() -> None:
    pairs = load(FOLDER / "dno.yaml").pairs
    assert (pairs.chosen_score, pairs.gap, pairs.gap_own, pairs.answers) == (5, (2, None), (1, None), "all")
