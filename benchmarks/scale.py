"""Predictions for models of 8 B to 1 T parameters, of which only headers exist: files are holes behind them.

    python -m benchmarks.scale [--cores 16] [--disk 2,1] [--net 1.25] [--only llama-3-8b] [--folder DIR]

The shapes are those of the released models' configs. Planning is measured as a whole process; the time of a run follows
from the plan, the rates given, and what computing costs on this machine's processor.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks.bench import say
from benchmarks.machine import this_machine
from benchmarks.processes import Run, measured
from benchmarks.tables import Table, publish, size
from mergekit_lite.commands import values
from mergekit_lite.layout import OutputTensor, grouped_by_size, index_json, safetensors_layout, shard_names

SHARD = 5_000_000_000
EDGE = 128  # of an FP8 block
NODES = (1, 4, 16)


@dataclass(frozen=True)
class Architecture:
    """A released model: its config, as far as shapes follow from it, and whether its matrices are in FP8."""

    name: str
    config: dict[str, Any]
    tensors: Callable[[dict[str, Any]], Iterator[tuple[str, tuple[int, ...]]]]
    fp8: bool = False

    def layout(self) -> list[OutputTensor]:
        """Return all tensors, the scales of FP8 codes behind them."""
        made = []
        for name, shape in self.tensors(self.config):
            codes = self.fp8 and name.endswith(("_proj.weight", "_with_mqa.weight"))
            made.append(OutputTensor(name, "float8_e4m3fn" if codes else "bfloat16", shape))
            if codes:
                blocks = tuple(-(-length // EDGE) for length in shape)
                made.append(OutputTensor(f"{name}_scale_inv", "float32", blocks))
        return made

    def parameters(self) -> int:
        """Return the number of weights, without scales."""
        return sum(tensor.numel for tensor in self.layout() if not tensor.name.endswith("_scale_inv"))

    def make(self, folder: Path) -> None:
        """Write a checkpoint that holds headers and holes."""
        groups = grouped_by_size(self.layout(), SHARD)
        layout = safetensors_layout(groups, shard_names(len(groups)))
        folder.mkdir(parents=True)
        for shard in layout.files:
            with (folder / shard.name).open("wb") as file:
                file.write(shard.header)
                file.truncate(shard.size)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index_json(layout.files)))
        config = dict(self.config)
        if self.fp8:
            config["quantization_config"] = {
                "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [EDGE, EDGE]
            }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config))


def _llama(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, mlp = config["hidden_size"], config["intermediate_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name, rows in (("q", hidden), ("k", keys), ("v", keys), ("o", hidden)):
            yield f"{prefix}.self_attn.{name}_proj.weight", (rows, hidden)
        yield from _mlp(f"{prefix}.mlp", hidden, mlp)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{name}.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config["vocab_size"], hidden)


def _mlp(prefix: str, hidden: int, mlp: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, shape in (("gate", (mlp, hidden)), ("up", (mlp, hidden)), ("down", (hidden, mlp))):
        yield f"{prefix}.{name}_proj.weight", shape


def _deepseek(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    queries, keys = config["q_lora_rank"], config["kv_lora_rank"]
    plain, rotary, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        attention = f"{prefix}.self_attn"
        yield f"{attention}.q_a_proj.weight", (queries, hidden)
        yield f"{attention}.q_a_layernorm.weight", (queries,)
        yield f"{attention}.q_b_proj.weight", (heads * (plain + rotary), queries)
        yield f"{attention}.kv_a_proj_with_mqa.weight", (keys + rotary, hidden)
        yield f"{attention}.kv_a_layernorm.weight", (keys,)
        yield f"{attention}.kv_b_proj.weight", (heads * (plain + value), keys)
        yield f"{attention}.o_proj.weight", (hidden, heads * value)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{name}.weight", (hidden,)
        if layer < config["first_k_dense_replace"]:
            yield from _mlp(f"{prefix}.mlp", hidden, config["intermediate_size"])
            continue
        yield f"{prefix}.mlp.gate.weight", (config["n_routed_experts"], hidden)
        yield f"{prefix}.mlp.gate.e_score_correction_bias", (config["n_routed_experts"],)
        for expert in range(config["n_routed_experts"]):
            yield from _mlp(f"{prefix}.mlp.experts.{expert}", hidden, config["moe_intermediate_size"])
        shared = config["n_shared_experts"] * config["moe_intermediate_size"]
        yield from _mlp(f"{prefix}.mlp.shared_experts", hidden, shared)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config["vocab_size"], hidden)


def _llama_config(hidden: int, mlp: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": mlp,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 8, "vocab_size": 128_256,
        "torch_dtype": "bfloat16", "tie_word_embeddings": False,
    }  # fmt: skip


def _deepseek_config(layers: int, dense: int, experts: int, heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 7168,
        "intermediate_size": 18_432, "moe_intermediate_size": 2048, "num_hidden_layers": layers,
        "first_k_dense_replace": dense, "n_routed_experts": experts, "n_shared_experts": 1,
        "num_attention_heads": heads, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": vocabulary, "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
    }  # fmt: skip


ARCHITECTURES = (
    Architecture("Llama 3 8B", _llama_config(4096, 14_336, 32, 32), _llama),
    Architecture("Llama 3 70B", _llama_config(8192, 28_672, 80, 64), _llama),
    Architecture("Llama 3.1 405B", _llama_config(16_384, 53_248, 126, 128), _llama),
    Architecture("DeepSeek V3 (671 B), FP8", _deepseek_config(61, 3, 256, 128, 129_280), _deepseek, fp8=True),
    Architecture("Kimi K2 (1 T), FP8", _deepseek_config(61, 1, 384, 64, 163_840), _deepseek, fp8=True),
)


def recipes(folder: Path, fp8: bool) -> dict[str, dict[str, Any]]:
    """Return the merges by name: extrapolation of a pair, and TIES of three."""
    base, *tuned = (str(folder / name) for name in ("base", "math", "code"))
    half = {"weight": 0.5, "density": 0.5}
    shared = {"base_model": base, **({"out_dtype": "fp8"} if fp8 else {})}
    return {
        "extrapolate": {
            "merge_method": "expo",
            "models": [{"model": tuned[0]}],
            "parameters": {"alpha": 0.3},
            **shared,
        },
        "ties of three": {
            "merge_method": "ties",
            "models": [{"model": each, "parameters": half} for each in tuned],
            **shared,
        },
    }


@click.command()
@click.option("--cores", type=click.IntRange(min=1), default=16, show_default=True, help="Of each node.")
@click.option("--disk", default="2,1", callback=values.rates, help="As of plan.  [default: 2,1]")
@click.option("--net", default="1.25", callback=values.rate, help="As of plan.  [default: 1.25]")
@click.option("--only", metavar="NAMES", help="Models whose names begin so, separated by commas.")
@click.option(
    "--folder", type=click.Path(path_type=Path, file_okay=False), default=Path(__file__).parent / "out",
    help="For headers and results.  [default: benchmarks/out]",
)  # fmt: skip
def main(cores: int, disk: tuple[float, float], net: float, only: str | None, folder: Path) -> None:
    """Print the tables of docs/scale.md."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes: list[list[str]] = []
    on_disk: list[list[str]] = []
    over_net: list[list[str]] = []
    figures: dict[str, Any] = {}
    for architecture in ARCHITECTURES:
        if only and not any(architecture.name.startswith(name) for name in only.split(",")):
            continue
        say(f"{architecture.name}: {architecture.parameters() / 1e9:.0f} B parameters")
        with tempfile.TemporaryDirectory(dir=folder) as place:
            for name in ("base", "math", "code"):
                architecture.make(Path(place, name))
            for label, recipe in recipes(Path(place), architecture.fp8).items():
                Path(place, "recipe.yml").write_text(json.dumps(recipe))
                planned, predictions = _predicted(Path(place, "recipe.yml"), cores, disk, net)
                row = [architecture.name, label]
                first = predictions["disk"][1]
                sizes.append([
                    *row, f"{len(architecture.layout()):,}", size(first["bytes"]["read"]),
                    size(first["bytes"]["written"]), f"{planned.user + planned.system:.1f} s", size(planned.peak),
                    size(first["memory"]),
                ])  # fmt: skip
                on_disk.append([*row, *(_told(predictions["disk"][nodes]) for nodes in NODES)])
                over_net.append([*row, *(_told(predictions["net"][nodes]) for nodes in NODES)])
                figures[f"{architecture.name}, {label}"] = predictions
    machine = this_machine()
    heading = f"Predictions for nodes of {cores} cores like those of this machine: {machine}."
    nodes = [f"{number} node{'s' * (number > 1)}" for number in NODES]
    columns = ("model", "merge", "tensors", "read", "written", "planning", "its memory", "memory of a node")
    tables = [
        Table("Plans", columns, sizes),
        Table(f"A shared file system: {_rates(disk)} for each node", ("model", "merge", *nodes), on_disk),
        Table(f"An object store: {net / 1e9:g} GB/s each way for each node", ("model", "merge", *nodes), over_net),
    ]
    publish(folder, "scale", heading, tables, [], {"machine": machine.as_data(), "predictions": figures})


def _predicted(
    recipe: Path, cores: int, disk: tuple[float, float], net: float
) -> tuple[Run, dict[str, dict[int, dict[str, Any]]]]:
    """Return what planning takes as a process, and the predictions for both kinds of storage by number of nodes."""
    from mergekit_lite.merging import plan_merge
    from mergekit_lite.prediction import Cluster, measured_costs, predict

    program = shutil.which("mergekit-lite", path=str(Path(sys.executable).parent)) or "mergekit-lite"
    planned = measured([program, "plan", str(recipe)])
    say(f"  planned in {planned.user + planned.system:.1f} s of processor time")
    plan = plan_merge(recipe, "merged")
    costs = measured_costs(plan)
    started = planned.user + planned.system
    clusters = {
        "disk": [Cluster(cores, nodes, read=disk[0], write=disk[1]) for nodes in NODES],
        "net": [Cluster(cores, nodes, net=net) for nodes in NODES],
    }
    return planned, {
        kind: {each.nodes: predict(plan, each, None, started, costs).to_json() for each in of_kind}
        for kind, of_kind in clusters.items()
    }


def _told(prediction: dict[str, Any]) -> str:
    from mergekit_lite.commands.units import seconds

    return f"{seconds(prediction['seconds']['total'])} ({prediction['limit']})"


def _rates(disk: tuple[float, float]) -> str:
    read, write = (f"{rate / 1e9:g} GB/s" for rate in disk)
    return f"{read} to read and {write} to write"


if __name__ == "__main__":
    main()
