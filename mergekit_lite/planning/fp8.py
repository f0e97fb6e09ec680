"""Which tensors of an FP8 output are quantised, and the scales that come with them.

As in the FP8 models of DeepSeek and Qwen, these are the linear layers of attention and MLP. Embeddings, head, norms,
routers, towers of other modalities and whatever else there is stay bfloat16.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from mergekit_lite import block_fp8, dtypes
from mergekit_lite.planning.plan import Job

LINEAR = re.compile(
    r"(?P<parent>(?:.*\.)?layers\.\d+\.(?:.*\.)?(?:self_attn|attention|mlp|feed_forward|shared_experts?|experts\.\d+)\.)"
    r"(?:[qkvo]_proj|qkv_proj|q_[ab]_proj|kv_a_proj_with_mqa|kv_b_proj|(?:gate|up|down|gate_up)_proj|w[123])\.weight"
)
TOWER = re.compile(r"(^|\.)(visual|vision\w*|audio\w*|image\w*)\.")
HEAD = "lm_head"


def quantised_jobs(jobs: Sequence[Job]) -> list[Job]:
    """Return the jobs with those of linear layers to be quantised, and a job for the scales of each.

    The linear layers of one parent (a layer's attention, its MLP, an expert) are quantised together or not at all, as
    programs that serve models fuse them. They are where all their sizes are multiples of 128.
    """
    whole = {_parent(job): True for job in jobs}
    for job in jobs:
        whole[_parent(job)] &= _has_whole_blocks(job)
    result: list[Job] = []
    for job in jobs:
        parent = _parent(job)
        if not parent or not whole[parent]:
            result.append(job)
            continue
        rows, columns = job.shape
        name = job.name + block_fp8.SCALE_ENDING
        grid = rows // block_fp8.EDGE, columns // block_fp8.EDGE
        result.append(replace(job, dtype=block_fp8.CODES, scales=name))
        result.append(Job(name, block_fp8.SCALES, grid, (), (), scales_of=job.name))
    return result


def modules_not_quantised(jobs: Sequence[Job]) -> list[str]:
    """Return the modules with matrices that stay as they are, and the head, which may be tied."""
    kept = [job.name for job in jobs if len(job.shape) > 1 and not job.scales and not job.scales_of]
    return list(dict.fromkeys([*(name.removesuffix(".weight") for name in kept), HEAD]))


def _parent(job: Job) -> str:
    """Return the module that a linear layer is in; empty for other tensors."""
    match = LINEAR.fullmatch(job.name)
    return match["parent"] if match and not TOWER.search(job.name) else ""


def _has_whole_blocks(job: Job) -> bool:
    sizes = len(job.shape) == 2 and not any(size % block_fp8.EDGE for size in job.shape)
    return sizes and job.numel > 0 and dtypes.is_float(job.dtype) and job.merged_elements in (0, job.numel)
