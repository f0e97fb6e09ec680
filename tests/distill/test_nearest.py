"""The nearest prompts of a pool: against brute force, by a column, by a model, killed and resumed, and in a dry run."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from mergekit_lite.answers.embedding import Embedder
from mergekit_lite.answers.rows import Prompt, write_rows
from mergekit_lite.commands.distill import command
from mergekit_lite.distillation import embeddings, nearest
from mergekit_lite.distillation.nearest import places_of_nearest
from mergekit_lite.distillation.prompts import read, settled
from mergekit_lite.distillation.recipe.schema import Recipe
from mergekit_lite.errors import CheckpointError, RunError, UsageError
from tests.distill.recipes import recipe, write_recipe
from tests.distill.test_pair import Heard


def brute(pool: np.ndarray, targets: np.ndarray, k: int, distance: str) -> list[int]:
    """One distance after the other, then a stable sort."""
    if distance == "cosine":
        pool, targets = ([v / (np.linalg.norm(v) or 1) for v in some] for some in (pool, targets))  # type: ignore[assignment]
    kept = set()
    for target in targets:
        away = [sum((float(x) - float(t)) ** 2 for x, t in zip(vector, target, strict=True)) for vector in pool]
        kept.update(sorted(range(len(away)), key=away.__getitem__)[:k])
    return sorted(kept)


@pytest.fixture
def draws() -> np.random.Generator:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    return np.random.default_rng(seed)


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize(("block", "cells"), [(4096, 1 << 25), (7, 200), (60, 1)])
def test_against_brute_force(
    monkeypatch: pytest.MonkeyPatch, draws: np.random.Generator, distance: str, block: int, cells: int
) -> None:
    """Small whole numbers, so that many are equally near, in blocks or at once."""
    monkeypatch.setattr(nearest, "BLOCK", block)
    monkeypatch.setattr(nearest, "CELLS", cells)
    pool = draws.integers(-2, 3, (60, 3)).astype(float)
    wanted = draws.integers(-2, 3, (8, 3)).astype(float) + 0.25
    for k in (1, 4, 59, 60, 99):
        assert places_of_nearest(pool, wanted, k, distance) == brute(pool, wanted, k, distance), k


def test_cosine(draws: np.random.Generator) -> None:
    """By the angle alone: by definition, whatever the lengths."""
    pool, wanted = draws.normal(size=(50, 5)), draws.normal(size=(4, 5))
    angles = 1 - (wanted @ pool.T) / np.linalg.norm(wanted, axis=1)[:, None] / np.linalg.norm(pool, axis=1)
    expected = sorted({int(place) for row in angles for place in np.argsort(row)[:3]})
    longer = draws.uniform(0.01, 100, (50, 1))
    assert places_of_nearest((pool * longer).astype(np.float32), wanted, 3, "cosine") == expected


def test_embeddings_of_unlike_lengths(draws: np.random.Generator) -> None:
    """Far from the origin, or beside one that is far away: by their distance, and equal ones by their place."""
    pool = np.full((6, 4), 1000, np.float32)
    pool[:, 0] += np.array([3, 1, 2, 1, 0.5, 1], np.float32)
    assert places_of_nearest(pool, np.full((1, 4), 1000, np.float32), 2, "euclidean") == [1, 4]
    pool = draws.normal(size=(400, 64))
    pool[draws.permutation(400)[:200]] = pool[0]  # equal ones, whose products may differ in their last bits
    wanted = draws.normal(size=(5, 64))
    expected = brute(pool, wanted, 7, "euclidean")
    assert places_of_nearest(pool, wanted, 7, "euclidean") == expected
    pool[399] *= 1e8
    assert places_of_nearest(pool, wanted, 7, "euclidean") == brute(pool, wanted, 7, "euclidean")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A decoder, an encoder, and a model with both."""
    import torch
    import transformers

    from tests.causal import causal_model
    from tests.tokenizers import tokenizer

    folder = tmp_path_factory.mktemp("models")
    sizes = {"vocab_size": 340, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    made: dict[str, Any] = {
        "gpt2": causal_model("gpt2"),
        "bert": transformers.BertModel(
            transformers.BertConfig(**sizes, intermediate_size=64, max_position_embeddings=64)
        ),
        "t5": transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=340, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=2)
        ),
    }
    for name, model in made.items():
        model.save_pretrained(folder / name)
        tokenizer("chatml").save_pretrained(folder / name)
    return {name: folder / name for name in made}


TEXTS = ["What is one", "two", "three four five helpful user system " * 3, "one", "assistant is two"]


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5"])
def test_embeddings_are_means_of_hidden_states(models: dict[str, Path], name: str) -> None:
    """Each text by itself, without padding; longer ones are cut; and the same texts have the same bits again."""
    import torch
    from transformers import AutoModel, AutoTokenizer, T5EncoderModel

    model = (T5EncoderModel if name == "t5" else AutoModel).from_pretrained(models[name]).eval()
    tokens = AutoTokenizer.from_pretrained(models[name])
    embedder = Embedder(str(models[name]), max_length=12, batch_size=3)
    found = embedder.embed(TEXTS)
    expected, cut = [], 0
    for text in TEXTS:
        ids = tokens(text)["input_ids"]
        cut += len(ids) > 12
        with torch.no_grad():
            states = model(input_ids=torch.tensor([ids[:12]])).last_hidden_state[0].numpy().astype(np.float64)
        expected.append(states.mean(0))
    assert found.dtype == np.float32 and found.shape == (5, 32)
    np.testing.assert_allclose(found, np.array(expected), rtol=1e-4, atol=1e-5)
    assert embedder.cut == cut > 0
    assert found.tobytes() == Embedder(str(models[name]), max_length=12, batch_size=3).embed(TEXTS).tobytes()


def test_models_that_can_not_embed(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a model with hidden states"):
        Embedder(str(models["gpt2"] / "nowhere")).model  # noqa: B018
    import torch
    from transformers import AutoModel, AutoTokenizer

    broken = AutoModel.from_pretrained(models["gpt2"])
    torch.nn.init.constant_(broken.ln_f.weight, float("inf"))
    broken.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(models["gpt2"]).save_pretrained(tmp_path)
    with pytest.raises(RunError, match="is not finite"):
        Embedder(str(tmp_path)).embed(TEXTS)


def write_data(folder: Path, vectors: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """A pool of 20 prompts and 3 targets; with their embeddings in a column. Returns the embeddings."""
    draws = np.random.default_rng(4)
    found = []
    for name, number in (("pool", 20), ("targets", 3)):
        embeddings = draws.normal(size=(number, 4))
        rows: list[dict[str, Any]] = [
            {"id": f"{name}{k}", "prompt": f"{name} {k} " + "one two " * (k % 5)} for k in range(number)
        ]
        for row, vector in zip(rows, embeddings, strict=True):
            row |= {"vector": vector.tolist(), "topic": "x"} if vectors else {}
        write_rows(folder / f"{name}.jsonl", rows)
        found.append(embeddings)
    return found[0], found[1]


def near(folder: Path, more: Sequence[dict[str, Any]] = (), **settings: Any) -> Recipe:
    pool = {"path": "pool.jsonl", "nearest": {"to": [{"path": "targets.jsonl"}], "k": 3, **settings}}
    return recipe(folder, prompts=[pool, *more])


def ids(prompts: Sequence[Prompt]) -> list[str]:
    return [prompt.id for prompt in prompts]


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_by_a_column(tmp_path: Path, distance: str) -> None:
    """In the order of the data; the embedding isn't kept, and a plan tells the same."""
    pool, targets = write_data(tmp_path)
    made = near(tmp_path, column="vector", distance=distance)
    heard = Heard()
    prompts = settled(made, heard)
    expected = brute(pool, targets, 3, distance)
    assert ids(prompts) == [f"pool{place}" for place in expected] and 3 <= len(prompts) < 10
    assert heard.lines == [
        f"pool.jsonl: {len(prompts)} of 20 prompts kept: the 3 nearest of 3 target prompts, each once"
    ]
    assert not any(prompt.columns for prompt in prompts)
    assert read(made, Heard(), plan=True) == prompts
    assert not (made.folder / "embeddings").exists()


def test_what_keep_names_stays(tmp_path: Path) -> None:
    write_data(tmp_path)
    for keep, columns in ((["topic"], {"topic"}), (["vector"], {"vector"}), ("all", {"topic"})):
        pool = {
            "path": "pool.jsonl",
            "keep": keep,
            "nearest": {"to": [{"path": "targets.jsonl"}], "k": 1, "column": "vector"},
        }
        assert {frozenset(prompt.columns) for prompt in read(recipe(tmp_path, prompts=[pool]), Heard())} == {
            frozenset(columns)
        }


def test_beside_other_prompts(tmp_path: Path) -> None:
    """A prompt that isn't near, and comes again in other data, is kept for them; one that is near comes once."""
    pool, targets = write_data(tmp_path)
    every = [f"pool{place}" for place in range(20)]
    kept = [f"pool{place}" for place in brute(pool, targets, 3, "euclidean")]
    heard = Heard()
    prompts = read(near(tmp_path, column="vector", more=[{"path": "pool.jsonl"}]), heard)
    assert sorted(ids(prompts)) == sorted(every) and ids(prompts)[: len(kept)] == kept
    assert f"{len(kept)} prompts asked before in the data, taken once" in heard.lines


def test_embeddings_that_can_not_be_used(tmp_path: Path) -> None:
    write_data(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "pool.jsonl").read_text().splitlines()]
    for place, wrong in enumerate(([], "0.5", [1, 2, 3, "4"], [True] * 4, None, [1, 2, 3, 10**200])):
        rows[place]["vector"] = wrong
    write_rows(tmp_path / "pool.jsonl", rows)
    heard = Heard()
    prompts = read(near(tmp_path, column="vector", k=99), heard)
    assert ids(prompts) == [f"pool{place}" for place in range(6, 20)]
    (warning,) = heard.warnings
    assert "6 rows" in warning and "pool.jsonl:3: the column 'vector' is no list of numbers" in warning
    rows[7]["vector"] = [1.0]
    write_rows(tmp_path / "pool.jsonl", rows)
    with pytest.raises(UsageError, match="different lengths"):
        read(near(tmp_path, column="vector"), Heard())
    write_rows(tmp_path / "targets.jsonl", [{"prompt": "x", "vector": [1, 2, 3]}])
    rows[7]["vector"] = [1, 2, 3, 4]
    write_rows(tmp_path / "pool.jsonl", rows)
    with pytest.raises(UsageError, match=r"different lengths: 4 and 3\."):
        read(near(tmp_path, column="vector"), Heard())
    write_rows(tmp_path / "targets.jsonl", [{"prompt": "x", "vector": "none"}])
    with pytest.raises(UsageError, match="no target prompt whose neighbours"):
        read(near(tmp_path, column="vector"), Heard())
    with pytest.raises(UsageError, match=r"Did you mean 'vector'"):
        read(near(tmp_path, column="vektor"), Heard())


def test_by_a_model_killed_and_resumed(
    tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was embedded is embedded no more, a damaged file is made again, and the prompts are the same."""
    monkeypatch.setattr(embeddings, "TEXTS", 6)
    write_data(tmp_path, vectors=False)
    made = near(tmp_path, model=str(models["gpt2"]))
    texts = {
        name: [json.loads(line)["prompt"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("pool", "targets")
    }
    pool, targets = (Embedder(str(models["gpt2"])).embed(some) for some in texts.values())
    expected = [f"pool{place}" for place in brute(pool.astype(float), targets.astype(float), 3, "euclidean")]
    embed, asked = Embedder.embed, list[int]()

    def counted(self: Embedder, texts: Sequence[str]) -> np.ndarray:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(texts))
        return embed(self, texts)

    monkeypatch.setattr(Embedder, "embed", counted)
    with pytest.raises(KeyboardInterrupt):
        settled(made, Heard())
    assert asked == [6, 6] and not (made.folder / "prompts.jsonl").exists()
    files = sorted((made.folder / "embeddings").glob("*.npy"))
    assert len(files) == 2
    files[0].write_bytes(files[0].read_bytes()[:-8])
    asked[:] = [0, 0, 0]
    heard = Heard()
    assert ids(settled(made, heard)) == expected
    assert (
        heard.lines[0]
        == f"pool.jsonl: {len(expected)} of 20 prompts kept: the 3 nearest of 3 target prompts, each once"
    )
    assert sorted(asked) == [0, 0, 0, 2, 3, 6, 6]
    asked[:] = [0, 0]  # whoever embeds now is stopped
    assert ids(settled(made, Heard())) == expected
    assert ids(read(made, Heard(), plan=True)) == expected


def test_a_dry_run_embeds_nothing(tmp_path: Path, models: dict[str, Path]) -> None:
    write_data(tmp_path, vectors=False)
    pool = {"path": "pool.jsonl", "nearest": {"to": [{"path": "targets.jsonl"}], "k": 3, "model": str(models["gpt2"])}}
    path = write_recipe(tmp_path, prompts=[pool], target=str(models["gpt2"]))
    for options in ([], ["--json"]):
        ran = CliRunner().invoke(command, ["run", str(path), "--dry-run", *options])
        assert ran.exit_code == 0, ran.output
        if options:
            assert [domain["prompts"] for domain in json.loads(ran.output)["domains"]] == [9]
        else:
            assert "pool.jsonl: at most 9 of 20 prompts will be kept, the 3 nearest of 3 target prompts" in ran.output
    assert not (tmp_path / "out").exists()
    pool["nearest"] |= {"model": str(tmp_path / "nowhere")}  # type: ignore[operator]
    path = write_recipe(tmp_path, prompts=[pool], target=str(models["gpt2"]))
    ran = CliRunner().invoke(command, ["run", str(path), "--dry-run"])
    assert "the model that embeds prompts: " in ran.output and "nowhere is no folder" in ran.output
    for stage in ("sample", "run"):
        ran = CliRunner().invoke(command, [stage, str(path)])
        assert "the model that embeds prompts: " in str(ran.exception) and "is no folder" in str(ran.exception)
