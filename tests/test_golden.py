"""The record of what the package writes: digests of the bytes of outputs, which no refactoring may change.

``tests/golden.json`` holds a digest for every file of every output: weights, index, config, and what travels with them;
not model cards and manifests, which tell versions and paths. A change that means to alter bytes rewrites the record,
and its commit says which entries changed and why:

    python -m tests.test_golden

The inputs are sums of integers from numpy's raw bit generator, so that they are the same with every release of numpy
and torch. The record is written with one thread and checked with two. Only names that the package offers to everyone
are used: its functions ``merge`` and ``extrapolate``, and its commands.

Entries are the same with the compiled kernels and without, for any threads, and with torch's AVX2 and plain code. The
only ones that another CPU or LAPACK might change are the low-rank formats of ``vectors`` (``lowrank``, ``energy``,
``lora`` and ``applied-low``), which hold singular vectors, and those of methods that compute sums, angles or roots with
torch in float32: ``karcher``, ``geometric_median``, ``multislerp``, ``nuslerp``, ``slerp``, ``varm`` and ``sce``;
``relex``, by an eigenvector; the methods by singular vectors, such as ``iso_c``; and ``regmean``, by Cholesky.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
import yaml
from click.testing import CliRunner

import mergekit_lite
from mergekit_lite.commands import main
from tests.adapters import PREFIX, write_adapter
from tests.models import State, write_folder
from tests.statistics_files import write_those_of

RECORD = Path(__file__).with_name("golden.json")
RECIPES = sorted((Path(__file__).parents[1] / "recipes" / "methods").glob("*.yml"))
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TORCH = torch.__version__.partition("+")[0]  # its releases differ in the frame of a .pt file
BY_LAPACK = "relex/mergekit_lite_coefficients.json"  # all digits of what an eigenvector says: recorded rounded
NOT_RECORDED = ("README.md", "mergekit_lite_manifest.json", ".manifest.json")
HIDDEN, VOCABULARY = 8, 16
LAYER = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (2 * HIDDEN, HIDDEN),
    "mlp.up_proj": (2 * HIDDEN, HIDDEN),
    "mlp.down_proj": (HIDDEN, 2 * HIDDEN),
    "input_layernorm": (HIDDEN,),
}
# Both have more than 2^18 elements, so thresholds are found from samples and merges take several blocks; the first has
# more than 2^20, so several chunks.
LARGE = {"model.layers.0.mlp.up_proj.weight": (1201, 900), "model.layers.0.mlp.down_proj.weight": (601, 500)}


# Inputs


def noise(seed: int, shape: tuple[int, ...], exponent: int) -> np.ndarray:
    """Return exact float64 numbers, nearly normal, with a standard deviation of about 1.15 · 2^exponent."""
    count = int(np.prod(shape))
    draws = np.random.PCG64(seed).random_raw(count).astype("<u8").view("<u2").reshape(count, 4)
    return np.ldexp(draws.sum(axis=1, dtype=np.int64) - 2 * 65535, exponent - 15).reshape(shape)


def shapes(layers: int, vocabulary: int = VOCABULARY) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a small Llama's tensors."""
    named = {f"model.layers.{layer}.{part}.weight": shape for layer in range(layers) for part, shape in LAYER.items()}
    ends = {"model.embed_tokens.weight": (vocabulary, HIDDEN), "lm_head.weight": (vocabulary, HIDDEN)}
    return ends | named | {"model.norm.weight": (HIDDEN,)}


def model(tensors: Mapping[str, tuple[int, ...]], dtype: str, seed: int = 0) -> State:
    """Return the base (seed 0) or a model tuned from it. A tensor with more rows begins with those of a shorter one."""
    return {
        name: torch.from_numpy(noise(number, shape, -6) + (noise(1000 * seed + number, shape, -10) if seed else 0)).to(
            DTYPES[dtype]
        )
        for number, (name, shape) in enumerate(tensors.items())
    }


def write_models(names: list[str], tensors: Mapping[str, tuple[int, ...]], dtype: str, shards: int = 1) -> None:
    """Write the base and models tuned from it into folders of the working folder, each with a tokenizer."""
    layers = 1 + max(int(name.split(".")[2]) for name in tensors if ".layers." in name)
    config = {"model_type": "llama", "num_hidden_layers": layers, "torch_dtype": dtype, "tie_word_embeddings": False}
    for seed, name in enumerate(names):
        folder = write_folder(Path(name), model(tensors, dtype, seed), shards=shards, config=config)
        (folder / "tokenizer.json").write_text("{}")


def write_lora(folder: str, seed: int, sizes: Mapping[str, tuple[int, int]] | None = None, rank: int = 4) -> None:
    """Write an adapter of linear layers."""
    factors = {}
    for number, (module, (rows, columns)) in enumerate((sizes or {"model.layers.0.self_attn.q_proj": (8, 8)}).items()):
        for side, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            drawn = noise(1000 * seed + 2 * number + (side == "B"), shape, -5)
            factors[f"{PREFIX}{module}.lora_{side}.weight"] = torch.from_numpy(drawn).float()
    write_adapter(Path(folder), factors, r=rank)


# Outputs


def command(*arguments: object) -> None:
    """Run a command of the package."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, f"{arguments}: {result.output}"


def merge(recipe: dict[str, Any], output: str, **how: Any) -> None:
    """Merge by a recipe, which is written into the working folder."""
    file = Path(f"{Path(output).name}.yml")
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    mergekit_lite.merge(file, output, **how)


def methods(dtype: str, threads: int) -> None:
    """Merge by every recipe of ``recipes/methods``, without its comments, which would travel with the output."""
    for file in RECIPES:
        recipe = yaml.safe_load(file.read_text())
        sources = [source for part in recipe.get("slices", ()) for source in part["sources"]] + recipe.get("models", [])
        names = dict.fromkeys([recipe.get("base_model", "org/base"), *(source["model"] for source in sources)])
        layers = max([6, *(source["layer_range"][1] for source in sources if "layer_range" in source)])
        write_models(list(names), shapes(layers), dtype)
        write_those_of(recipe)
        merge(recipe, f"out/{file.stem}", threads=threads)


def extrapolations(dtype: str, threads: int) -> None:
    """Extrapolate with every option that has a say in bytes."""
    write_models(["sft", "aligned"], shapes(3), dtype, shards=2)
    for seed, name in enumerate(("sft", "aligned")):
        torch.save(model(shapes(3), dtype, seed), f"{name}.pt")
    write_folder(Path("grown"), model(shapes(3, vocabulary=24), dtype, 1))
    pair = ("sft", "aligned")
    for name, *arguments in (
        ("folder", *pair, "-a", 0.3),
        ("alpha-{alpha}", *pair, "-a", "-1,0,0.25,2"),
        ("one.safetensors", *pair, "-a", 0.3),
        ("one.pt", *pair, "-a", 0.3),
        ("from-pt", "sft.pt", "aligned.pt", "-a", 0.3),
        ("from-pt.pt", "sft.pt", "aligned.pt", "-a", 0.3, "--rounding", "stochastic"),
        ("alpha-for", *pair, "-a", 0.3, "--alpha-for", "norm|embed=0", "--alpha-for", r"layers\.1\.=-0.7"),
        ("exclude", *pair, "-a", 0.3, "--exclude", "lm_head", "--exclude", "norm"),
        ("include", *pair, "-a", 0.3, "--include", "mlp"),
        ("include-exclude", *pair, "-a", 0.3, "--include", "mlp", "--exclude", "down_proj"),
        ("stochastic", *pair, "-a", "0.3", "--rounding", "stochastic", "--seed", 5),
        ("stochastic-{alpha}", *pair, "-a", "0.01,0.3", "--rounding", "stochastic"),
        ("to-float32", *pair, "-a", 0.3, "--out-dtype", "float32"),
        ("to-bfloat16", *pair, "-a", 0.3, "--out-dtype", "bfloat16", "--exclude", "norm"),
        ("shards", *pair, "-a", 0.3, "--shard-size", "1KB"),
        ("new-rows", "sft", "grown", "-a", 0.3, "--new-rows", "copy"),
        ("expo-back", "aligned", "sft", "-a", 0.5),
    ):
        command("extrapolate", *arguments, "-o", f"out/{name}", "--threads", threads, "-q")
    mergekit_lite.extrapolate(
        "sft",
        "aligned",
        "out/function",
        0.3,
        alpha_for={"norm": 1.0},
        exclude=["embed"],
        shard_size=1000,
        threads=threads,
    )


def recipes(dtype: str, threads: int) -> None:
    """Merge by recipes that use all of the language: slices, gradients, filters, overrides, exclusions, dtypes."""
    write_models(["base", "a", "b"], shapes(4), dtype, shards=2)
    (Path("a") / "tokenizer.json").write_text('{"model": {"vocab": {}}}')
    both = {"models": [{"model": "a"}, {"model": "b"}]}
    over = {"base_model": "base", **both}
    stack = [("a", [0, 3]), ("b", [1, 4])]
    for name, recipe in {
        "stack": {
            "merge_method": "passthrough",
            "slices": [{"sources": [{"model": name, "layer_range": span}]} for name, span in stack],
        },
        "slices": {
            "merge_method": "linear",
            "slices": [
                {"sources": [{"model": name, "layer_range": span} for name in "ab"], "parameters": {"weight": weight}}
                for span, weight in (([0, 2], 0.5), ([1, 4], [0.2, 0.8]))
            ],
            "parameters": {"normalize": False},
        },
        "gradients": {
            "merge_method": "slerp",
            "base_model": "base",
            "models": [{"model": "a"}],
            "parameters": {
                "t": [
                    {"filter": "self_attn", "value": [0, 0.5, 0.3, 1]},
                    {"filter": "regex:(up|down)_proj", "layers": [0, 2], "value": 0.9},
                    {"value": [0.1, 0.6]},
                ]
            },
        },
        "overrides": {
            "merge_method": "dare_ties",
            **over,
            "parameters": {"weight": 0.5, "density": 0.6},
            "exclude": ["lm_head", {"filter": "regex:norm", "layers": [0, 2]}],
            "overrides": [
                {"filter": "self_attn", "merge_method": "task_arithmetic", "parameters": {"weight": 0.3}},
                {"layers": [2, 4], "parameters": {"density": 0.9}},
            ],
            "seed": 7,
            "rounding": "stochastic",
        },
        "dtype": {"merge_method": "linear", **both, "parameters": {"weight": 0.5}, "dtype": "float16"},
        "out-dtype": {
            "merge_method": "ties",
            **over,
            "parameters": {"weight": [0.2, 0.8], "density": 0.4, "lambda": 1.5},
            "dtype": "float32",
            "out_dtype": "bfloat16",
            "exclude": ["embed_tokens"],
        },
        "float64": {"merge_method": "linear", **both, "parameters": {"weight": 0.3}, "dtype": "float64"},
        "template": {
            "merge_method": "linear",
            **over,
            "parameters": {"weight": 1.0},
            "tokenizer_source": "a",
            "chat_template": "chatml",
        },
        "ties-global": {"merge_method": "ties", **over, "parameters": {"weight": 1, "density": 0.3, "trim": "global"}},
        "varm-layer": {"merge_method": "varm", **over, "parameters": {"granularity": "layer"}},
        "varm-element": {"merge_method": "varm", **over, "parameters": {"granularity": "element"}},
        "sce-fusechat": {"merge_method": "sce", **over, "parameters": {"variant": "fusechat", "select_topk": 0.3}},
        "stock-rows": {"merge_method": "model_stock", **over, "parameters": {"filter_wise": True}},
        "nuslerp-rows": {
            "merge_method": "nuslerp",
            **over,
            "parameters": {"weight": 0.5, "nuslerp_flatten": False},
        },
    }.items():
        merge(recipe, f"out/{name}", threads=threads)
    for name in ("one.safetensors", "one.pt"):
        merge({"merge_method": "linear", **both, "parameters": {"weight": 0.7}}, f"out/{name}", threads=threads)
    command("merge", "overrides.yml", "-o", "out/shards", "--shard-size", "1KB", "--threads", threads, "-q")


def vectors(dtype: str, threads: int) -> None:
    """Extract task vectors in every format, apply them, combine them, name them in recipes."""
    write_models(["base", "a", "b"], shapes(2), dtype, shards=2)
    write_lora("adapter", 7)
    more = ("--threads", threads, "-q")
    for tuned in "ab":
        command("vector", "extract", "base", tuned, "-o", f"out/{tuned}.safetensors", *more)
    for name, *options in (
        ("sparse", "sparse", "--density", 0.2),
        ("threshold", "sparse", "--threshold", 0.001),
        ("sign", "sign"),
        ("lowrank", "lowrank", "--rank", 2),
        ("energy", "lowrank", "--energy", 0.8, "--seed", 3),
        ("lora", "lora", "--rank", 2),
    ):
        output = f"out/{name}" + ("" if name == "lora" else ".safetensors")
        command("vector", "extract", "base", "a", "-o", output, "--format", *options, *more)
    for name, *scaled in (
        ("exact", "out/a.safetensors"),
        ("both", "out/a.safetensors:0.5", "out/b.safetensors:0.25"),
        ("analogy", "+out/a.safetensors", "-out/b.safetensors"),
        ("all", "out/sparse.safetensors:0.7", "out/threshold.safetensors", "out/sign.safetensors:-0.3"),
        ("folders", "out/a.safetensors:0.5", "adapter:0.7"),
        ("low", "out/lowrank.safetensors", "out/energy.safetensors:0.5", "out/lora:-1"),
    ):
        command("vector", "apply", "base", *scaled, "-o", f"out/applied-{name}", *more)
    wide = ("--dtype", "float32", "--shard-size", "1KB")
    command("vector", "apply", "base", "out/a.safetensors:0.5", "-o", "out/applied-wide", *wide, *more)
    drawn = ("--rounding", "stochastic", "--seed", 4)
    command("vector", "apply", "base", "out/a.safetensors:0.1", "-o", "out/applied-drawn", *drawn, *more)
    command("vector", "apply", "b", "out/a.safetensors", "-o", "out/rebased.safetensors", "--rebase", *more)
    for name, *options in (
        ("linear", "-p", "weight=0.5", "-p", "normalize=false"),
        ("ties", "-p", "density=0.3"),
        ("dare_linear", "-p", "density=0.5", "--seed", 2),
        ("sce", "--dtype", "bfloat16"),
    ):
        scales = (":0.7", ":0.3") if name == "linear" else ("", "")
        both = [f"out/{tuned}.safetensors{scale}" for tuned, scale in zip("ab", scales, strict=True)]
        command("vector", "combine", "--method", name, *options, *both, "-o", f"out/combined-{name}.safetensors", *more)
    named = [{"model": f"vector:out/{tuned}.safetensors", "parameters": {"weight": 0.5}} for tuned in "ab"]
    merge(
        {"merge_method": "ties", "base_model": "base", "models": named, "parameters": {"density": 0.3}},
        "out/recipe",
        threads=threads,
    )


def adapters(dtype: str, threads: int) -> None:
    """Merge and extrapolate bases with adapters."""
    write_models(["base", "a"], shapes(2) | LARGE, dtype, shards=2)
    large = {name.removesuffix(".weight"): shape for name, shape in LARGE.items()}
    write_lora("adapter", 7, {"model.layers.0.self_attn.q_proj": (HIDDEN, HIDDEN)} | large)
    write_lora("small", 8, rank=2)
    for name, recipe in {
        "folded": {"merge_method": "passthrough", "models": [{"model": "./base+./adapter"}]},
        "ties": {
            "merge_method": "ties",
            "base_model": "./base",
            "models": [{"model": "./base+./adapter"}, {"model": "./a"}],
            "parameters": {"weight": 0.5, "density": 0.4},
        },
        "linear": {
            "merge_method": "linear",
            "models": [{"model": "./base+./adapter"}, {"model": {"model": "./a", "lora": "./small"}}],
            "parameters": {"weight": 0.5},
            "dtype": "bfloat16",
        },
    }.items():
        merge(recipe, f"out/{name}", threads=threads)
    more = ("--threads", threads, "-q")
    command("extrapolate", "./base", "./base+./adapter", "-a", "0.3,1", "-o", "out/expo-{alpha}", *more)
    command("extrapolate", "./base+./small", "./a", "-a", "0.3", "-o", "out/from", "--rounding", "stochastic", *more)


def large(dtype: str, threads: int) -> None:
    """Merge tensors large enough for sampled thresholds, several blocks, and several chunks."""
    write_models(["base", "a", "b"], shapes(1) | LARGE, dtype)
    for name, parameters in {
        "linear": {"weight": 0.5},
        "task_arithmetic": {"weight": 0.5},
        "slerp": {"t": 0.3},
        "karcher": {},
        "ties": {"weight": 0.5, "density": 0.3},
        "dare_ties": {"weight": 0.5, "density": 0.4},
        "dare_linear": {"weight": 0.5, "density": 0.4, "rescale": "density"},
        "della": {"weight": 0.5, "density": 0.5, "epsilon": 0.2},
        "della_linear": {"weight": 0.5, "density": 0.5, "epsilon": 0.2},
        "breadcrumbs": {"weight": 0.5, "density": 0.5, "gamma": 0.05, "rescale": "l1"},
        "breadcrumbs_ties": {"weight": 0.5, "density": 0.5, "gamma": 0.05},
        "sce": {"select_topk": 0.3},
        "model_stock": {},
        "varm": {},
    }.items():
        models = [{"model": name} for name in ("a" if name == "slerp" else "ab")]
        recipe = {"merge_method": name, "base_model": "base", "models": models, "parameters": parameters}
        merge(recipe, f"out/{name}", threads=threads)
    command("extrapolate", "base", "a", "-a", 0.3, "-o", "out/expo", "--threads", threads, "-q")
    drawn = ("--rounding", "stochastic")
    command("extrapolate", "base", "a", "-a", 0.3, "-o", "out/expo-drawn", *drawn, "--threads", threads, "-q")


# The record


GROUPS: dict[str, Callable[[str, int], None]] = {
    f"{group.__name__}/{dtype}": group
    for group in (methods, extrapolations, recipes, vectors, adapters, large)
    for dtype in DTYPES
}


def digest(path: Path) -> str:
    """Return the digest of a file's bytes; of numbers whose last digits are LAPACK's, with ten digits of each."""
    content = path.read_bytes()
    if path.as_posix().endswith(BY_LAPACK):
        content = json.dumps(json.loads(content, parse_float=lambda text: f"{float(text):.10g}")).encode()
    return xxhash.xxh3_128_hexdigest(content)


def digests(group: str, threads: int) -> dict[str, str]:
    """Return the digest of every recorded file that a group writes in a new working folder."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            Path("out").mkdir()
            GROUPS[group](group.partition("/")[2], threads)
            return {
                f"{group}/{path.relative_to('out').as_posix()}": digest(path)
                for path in sorted(Path("out").rglob("*"))
                if path.is_file() and not path.name.endswith(NOT_RECORDED)
            }
        finally:
            os.chdir(before)


# Only kernels know float16 from bfloat16, and tests/methods/test_kernels.py holds those of both to torch.
@pytest.mark.parametrize(
    "group", [pytest.param(each, marks=[pytest.mark.slow] * each.endswith("/float16")) for each in GROUPS]
)
def test_no_output_changed(group: str) -> None:
    record = json.loads(RECORD.read_text())
    expected = {name: digest for name, digest in record["digests"].items() if name.startswith(f"{group}/")}
    written = digests(group, threads=2)
    changed = [name for name in sorted(expected | written) if expected.get(name) != written.get(name)]
    if record["torch"] != TORCH:
        changed = [name for name in changed if not name.endswith(".pt")]
    assert not changed, f"{len(changed)} outputs changed, are new or are missing:\n" + "\n".join(changed)


def test_every_record_belongs_to_a_group() -> None:
    recorded = {name.rpartition("/")[0] for name in json.loads(RECORD.read_text())["digests"]}
    assert {"/".join(name.split("/")[:2]) for name in recorded} == set(GROUPS)


def write_record() -> None:
    """Write the record anew."""
    written = {name: digest for group in GROUPS for name, digest in digests(group, threads=1).items()}
    RECORD.write_text(json.dumps({"torch": TORCH, "digests": written}, indent=1) + "\n")
    print(f"{RECORD.name}: {len(written)} files")


if __name__ == "__main__":
    write_record()
