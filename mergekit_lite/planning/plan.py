"""A plan: everything that a run will do. Pure data, decided from headers before a weight is read.

It accounts for every tensor of every input: merged, copied, or left out, each with a reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import xxhash

from mergekit_lite import block_fp8, dtypes
from mergekit_lite._version import __version__
from mergekit_lite.checkpoint import Checkpoint, TensorSpec
from mergekit_lite.layout import Layout, OutputPath, OutputTensor
from mergekit_lite.planning.front_matter import FrontMatter


@dataclass(frozen=True, slots=True)
class Job(OutputTensor):
    """One output tensor, and what it is made of."""

    inputs: tuple[TensorSpec, ...]  # what it is made of: the models' tensors, then the base's where there is one
    models: tuple[int, ...]  # for each input, which of the plan's checkpoints it is from
    has_base: bool = False  # whether the last input is the base
    method: str = ""  # its name; empty for a copy
    parameters: tuple[Mapping[str, Any], ...] = ()  # the method's keyword arguments, for each output; empty for a copy
    merged_elements: int = 0  # leading elements that go through the method; the rest is copied from the first input
    why: str = ""  # the reason for a copy
    scales: str = ""  # of a job whose results are quantised to FP8: the name of the tensor of scales
    scales_of: str = ""  # of a tensor of scales, which is made with its codes: their name
    fisher: bool = False  # whether as many inputs follow the models' tensors: the Fisher information of each
    grams: tuple[TensorSpec, ...] = ()  # read whole beside the inputs: a Gram matrix for each model
    gram_axis: int = 1  # the axis of the tensor that meets the inputs that the Gram matrices are of

    @property
    def merges(self) -> int:
        """How many models it is merged from, the base not counted."""
        return (len(self.inputs) - self.has_base) // (1 + self.fisher)

    @property
    def computed_dtype(self) -> str:
        """The dtype that results are rounded to, before they are quantised if they are."""
        return block_fp8.SCALES if self.scales else self.dtype


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    Attributes:
        recipes: what was asked for, as plain data that YAML can hold; once for each output.
        inputs: the opened checkpoints; behind them files of statistics, ``statistics`` of them.
        config_source: which of them gives config, tokenizer and what else travels beside the weights.
        jobs: one for each output tensor, in the order they are written.
        left_out: what no output tensor is made of: (reference, name, reason).
        layout: where each output tensor lies; the same for every output.
        outputs: their paths, or places in object stores.
        rounding: ``nearest`` or ``stochastic``.
        seed: of everything random.
        out_dtype: the dtype asked for, if one was.
        config: the output's config but for dtype and tie, where layers were moved; None for that of ``config_source``.
        tokenizer: which of the inputs gives the tokenizer, where ``config_source`` doesn't.
        added_tokens: entries that ``tokenizer.json`` gets among its added tokens: new ones, or in the place of its own.
        chat_template: the output's, as text; None for the tokenizer's own.
        front_matter: what the output's card takes over from that of ``config_source``.
        text: the recipe as it was written, where it was a file.
        shard_size: most bytes of data in one file, if that was asked for.
        copy_code: whether the model's own code, which its config names, travels with the weights.
        notes: what the user should know before it runs.
        card: paragraphs in Markdown for the output's card, on what was chosen.
    """

    recipes: tuple[Mapping[str, Any], ...]
    inputs: tuple[Checkpoint, ...]
    config_source: int
    jobs: tuple[Job, ...]
    left_out: tuple[tuple[str, str, str], ...]
    layout: Layout
    outputs: tuple[OutputPath, ...]
    rounding: str = "nearest"
    seed: int = 0
    out_dtype: str | None = None
    config: Mapping[str, Any] | None = None
    tokenizer: int | None = None
    added_tokens: tuple[Mapping[str, Any], ...] = ()
    chat_template: str | None = None
    front_matter: FrontMatter = field(default_factory=dict)
    text: str = ""
    shard_size: int | None = None
    copy_code: bool = False
    notes: tuple[str, ...] = ()
    card: tuple[str, ...] = ()
    statistics: int = 0

    @property
    def source(self) -> Checkpoint:
        """The checkpoint that gives config, tokenizer and what else travels beside the weights."""
        return self.inputs[self.config_source]

    @property
    def tokenizer_source(self) -> Checkpoint:
        """The checkpoint that gives the tokenizer."""
        return self.source if self.tokenizer is None else self.inputs[self.tokenizer]

    @property
    def merged(self) -> list[Job]:
        """The jobs that go through the method."""
        return [job for job in self.jobs if job.merged_elements]

    @property
    def copied(self) -> list[Job]:
        """The jobs that take a tensor over as it is."""
        return [job for job in self.jobs if not job.merged_elements and not job.scales_of]

    @property
    def bytes_to_read(self) -> int:
        """Bytes of weights that will be read."""
        return sum(spec.nbytes for job in self.jobs for spec in (*job.inputs, *job.grams))

    @property
    def bytes_to_write(self) -> int:
        """Bytes of weights that will be written, all outputs together."""
        return self.layout.nbytes * len(self.outputs)

    @property
    def most_inputs(self) -> int:
        """The largest number of tensors that go into one."""
        return max((len(job.inputs) for job in self.jobs), default=1)

    @property
    def widest_element(self) -> int:
        """Bytes of the widest element that is read or written."""
        read = {spec.dtype for job in self.jobs for spec in (*job.inputs, *job.grams)}
        return max((dtypes.size(dtype) for dtype in read | {job.dtype for job in self.jobs}), default=1)

    @property
    def input_files(self) -> list[tuple[str, int, int]]:
        """Every input file with its size and time: what must not change until a run and its resumptions are done."""
        return [(str(file.path), file.size, file.mtime_ns) for source in self.inputs for file in source.files_read]

    @cached_property
    def for_workers(self) -> Plan:
        """The plan without what a worker has no use for: with its tasks it gets the jobs."""
        nowhere = Layout((), {})
        return replace(
            self, recipes=(), inputs=(), jobs=(), left_out=(), layout=nowhere, config=None, text="", notes=(), card=()
        )

    def digest(self, number: int) -> str:
        """Return what identifies an output: equal digests write equal bytes from equal files, wherever those lie."""
        described = [
            __version__,
            (self.recipes[number], self.text, self.rounding, self.seed, self.config_source),
            (self.config, self.tokenizer, self.added_tokens, self.chat_template, self.copy_code),
            [(file.name, file.size, file.header_digest) for source in self.inputs for file in source.files],
            *([_files_behind(self.inputs)] if any(source.made_while_read for source in self.inputs) else []),
            [(file.name, file.size) for file in self.layout.files],
            self.layout.nest,
        ]
        digest = xxhash.xxh3_128(repr(described).encode())
        own = slice(number, number + 1)  # nothing of a copy's parameters
        for job in self.jobs:
            made = (job.name, job.shape, job.dtype, job.method, job.has_base, job.merged_elements, job.parameters[own])
            digest.update(repr((made, [spec.key for spec in job.inputs])).encode())
            if job.grams:
                digest.update(repr((job.gram_axis, [spec.key for spec in job.grams])).encode())
        return digest.hexdigest()


def _files_behind(inputs: tuple[Checkpoint, ...]) -> list[tuple[str, int, str]]:
    """Return name, size and header of the files that models which are made while they are read are made of."""
    made = [source for source in inputs if source.made_while_read]
    return [(file.name, file.size, file.header_digest) for source in made for file in source.files_read]
