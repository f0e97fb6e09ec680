"""An output as its plan promises it, before it is made: its files with their headers and sizes, but without weights."""

from __future__ import annotations

import os
from pathlib import Path
from time import time_ns

from mergekit_lite.checkpoint.stores.addresses import is_elsewhere
from mergekit_lite.layout import index_json, indexed_files
from mergekit_lite.output.companions import companions, json_text, written_config
from mergekit_lite.planning import Plan
from mergekit_lite.planning.tokenizers import TOKENIZER_CONFIG, tokenizer_config
from mergekit_lite.planning.unions import TOKENIZER, written_tokenizer


def lay_promised(plan: Plan, folder: Path) -> None:
    """Lay a plan's first output into a new folder as far as it is known before a weight is read.

    A plan of what is to be made of it can be made from that folder. Where the weights will be, the files have holes,
    which take no room. Their time is that of the plan's newest input, as what is older was not made of it; where one
    lies elsewhere, whose time isn't known, it is now. Whether a head of its own equals the embedding is not known yet;
    here it does not. Raises OSError.
    """
    newest = max((time_ns() if is_elsewhere(path) else time for path, _, time in plan.input_files), default=0)
    files = {file.name: file for file in plan.layout.files}
    for name, file in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as promised:
            promised.write(file.header)
            promised.truncate(file.size)
        os.utime(path, ns=(newest, newest))
    written: dict[str, object] = {
        name: index_json([files[shard] for shard in shards]) for name, shards in indexed_files(files).items()
    }
    unequal = {job.name: {"output": job.name} for job in plan.jobs}
    for part in plan.source.configs:
        written[f"{part}/config.json" if part else "config.json"] = written_config(plan, unequal, part)
    if plan.chat_template is not None:
        written[TOKENIZER_CONFIG] = (tokenizer_config(plan.tokenizer_source) or {}) | {
            "chat_template": plan.chat_template
        }
    if plan.added_tokens:
        written[TOKENIZER] = written_tokenizer(plan.tokenizer_source, plan.added_tokens)
    for name, content in written.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(json_text(content).encode())
    for name, path in companions(plan)[0].items():
        if name not in written:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(path.read_bytes())
