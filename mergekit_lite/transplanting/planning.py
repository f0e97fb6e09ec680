"""Plan of a transplant: a model whose vocabulary has the donor's tokens, everything else of it copied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mergekit_lite.checkpoint import Checkpoint, TensorSpec, open_checkpoint, tied_weights
from mergekit_lite.checkpoint.encodings.gathered import Place, Places, gathered
from mergekit_lite.checkpoint.encodings.rebuilt import MEAN, NOBODY, OMP, Rebuilt, Sharing, rebuilt, rows_at_once
from mergekit_lite.checkpoint.extents import is_elsewhere
from mergekit_lite.checkpoint.folder import small_file
from mergekit_lite.checkpoint.tokenizer_file import Tokenizer, read_tokenizers
from mergekit_lite.deferred import np
from mergekit_lite.errors import CheckpointError, PlanError, UsageError, counted, nearest
from mergekit_lite.input_files import read_json
from mergekit_lite.layout import is_single_file, output_path
from mergekit_lite.options import named_options
from mergekit_lite.planning import Job, Plan, make_plan
from mergekit_lite.planning.token_numbers import NUMBER, with_numbers_of
from mergekit_lite.planning.vocabularies import VocabularyError, matrices, width_of, without_tokenizer
from mergekit_lite.recipe import parse, to_yaml
from mergekit_lite.transplanting.matching import matched, on_digits
from mergekit_lite.transplanting.subwords import Subwords

METHODS = ("omp", "nearest", "subword", "mean")
Method = Literal["omp", "nearest", "subword", "mean"]
SPARSE = 64
GENERATION = "generation_config.json"
TRANSPLANT = "transplant"  # in the place of a method's name in the manifest


@named_options
def plan_transplant(
    model: str | Path,
    donor: str | Path,
    output: str | Path,
    *,
    method: Method = "omp",
    k: int = SPARSE,
    pad_to_multiple_of: int | None = None,
    shard_size: int | None = None,
    copy_code: bool = False,
    opened: Mapping[str, Checkpoint] | None = None,
) -> Plan:
    """Plan a transplant; see ``transplant`` for the arguments and errors.

    ``opened`` are models that are open already, by reference.
    """
    if method not in METHODS:
        raise UsageError(f"method expects one of {', '.join(METHODS)}, got {method!r}.{nearest(method, METHODS)}")
    for name, number in (("k", k), ("pad_to_multiple_of", pad_to_multiple_of)):
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
            raise UsageError(f"{name} expects a whole number from 1 on, got {number!r}.")
    if is_single_file(output_path(output)):
        raise UsageError(f"{output}: is a file, and a transplant has a tokenizer beside its weights: name a folder.")
    of_rows = method in ("omp", "nearest")
    own, other = ((opened or {}).get(str(each)) or open_checkpoint(each) for each in (model, donor))
    making = _Transplant(own, other, method, k if of_rows else SPARSE, pad_to_multiple_of)
    changed, notes = making.carried_out()
    recipe = to_yaml({"merge_method": "passthrough", "models": [{"model": own.reference}]})
    plan = make_plan(
        parse(recipe), [output], shard_size=shard_size, copy_code=copy_code, opened={own.reference: changed}
    )
    described: dict[str, Any] = {"merge_method": TRANSPLANT, "model": own.reference, "donor": other.reference}
    described |= {"method": method}
    described |= {"k": k} if of_rows else {}
    described |= {"pad_to_multiple_of": pad_to_multiple_of} if pad_to_multiple_of else {}
    config = making.config(plan.config if plan.config is not None else own.config)
    gives = "the donor gives its tokenizer, and what its vocabulary says of tokens"
    return replace(
        plan,
        recipes=(described,),
        inputs=(*plan.inputs, other),
        jobs=tuple(_copied(job, method) for job in plan.jobs),
        left_out=(*plan.left_out, *((other.reference, name, gives) for name in other.tensors)),
        config=config,
        tokenizer=len(plan.inputs),
        notes=(*plan.notes, *notes),
    )


def planned_again(
    recipe: Mapping[str, Any],
    output: Path,
    *,
    shard_size: int | None,
    copy_code: bool,
    opened: Mapping[str, Checkpoint],
) -> Plan:
    """Return the plan that a manifest's recipe describes. Raises MergekitLiteError as ``plan_transplant``."""
    known = ("model", "donor", "method", "k", "pad_to_multiple_of")
    given = {name: recipe[name] for name in known if name in recipe}
    if not all(isinstance(given.get(name), str) for name in ("model", "donor", "method")):
        raise UsageError("The manifest's recipe is no transplant: it names no model, donor or method.")
    return plan_transplant(
        given.pop("model"),
        given.pop("donor"),
        output,
        **given,
        shard_size=shard_size,
        copy_code=copy_code,
        opened=opened,
    )


def _copied(job: Job, method: str) -> Job:
    """Return a job of ``passthrough`` as a copy, of a vocabulary's with what becomes of it."""
    is_vocabulary = any(isinstance(spec.encoding, Rebuilt) for spec in job.inputs)
    why = f"the donor's tokens, by {method}" if is_vocabulary else ""
    return replace(job, method="", parameters=(), merged_elements=0, why=why)


@dataclass
class _Transplant:
    """One transplant on its way to a plan."""

    model: Checkpoint
    donor: Checkpoint
    method: str
    k: int
    multiple: int | None

    def carried_out(self) -> tuple[Checkpoint, list[str]]:
        """Return the model with the donor's vocabulary, and what the user should know. Raises PlanError."""
        problems = [each.of_several for each in (self.model, self.donor) if each.of_several]
        for each in (self.model, self.donor):
            if any(is_elsewhere(spec) for spec in each.tensors.values()):
                problems.append(f"{each.reference}: its rows are read in no order: fetch it first, without --stream")
        if self.model.config is None:
            problems.append(f"{self.model.reference}: has no config.json, whose numbers of tokens have to follow")
        own, other = read_tokenizers([self.model, self.donor])
        for checkpoint, tokenizer in ((self.model, own), (self.donor, other)):
            if tokenizer is None or not tokenizer.tokens:
                problems.append(without_tokenizer(checkpoint))
        specs = matrices(self.model)
        rows, wrong = _rows(self.model, specs)
        pairs = {spec.name: self._counterpart(spec) for spec in specs}
        of_donor = [spec for spec in pairs.values() if spec is not None]
        donor_rows, wrong_of_donor = _rows(self.donor, of_donor)
        problems += [*wrong, *wrong_of_donor]
        if problems or own is None or other is None:
            raise PlanError(problems)
        width = self._width(other, donor_rows)
        match = matched(own, other, rows, donor_rows, width)
        if self.method != "subword" and not len(match.shared):
            problems.append(f"{self.model.reference} and {self.donor.reference} have no token in common")
        elif self.method in ("omp", "nearest") and self.k > len(match.shared):
            what = f"k is {self.k}, and {self.model.reference} and {self.donor.reference} have only"
            problems.append(f"{what} {counted(len(match.shared), 'token')} in common: choose a smaller k")
        if problems:
            raise PlanError(problems)
        self.match, self.own, self.other, self.width, self.donor_rows = match, own, other, width, donor_rows
        cut = self._pieces(rows) if self.method == "subword" else {}
        tensors = dict(self.model.tensors)
        for spec in specs:
            tensors[spec.name] = self._with_rows(spec, pairs[spec.name], cut)
        return replace(self.model, tensors=tensors), [*self._notes(of_donor, cut), *self._on_generation()]

    def config(self, config: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return the model's config with the number of rows and the numbers of tokens of the output."""
        assert config is not None
        numbers = {int(row): at for at, row in enumerate(self.match.rows.tolist()) if row >= 0}
        return with_numbers_of(config, self.donor.config or {}, self.width, numbers)

    def _on_generation(self) -> list[str]:
        """Return a warning where the model's generation config stays, as the donor has none, and numbers old tokens."""
        folders = (self.donor.tokenizer_folder, self.model.folder)
        of_donor, own = (small_file(folder, GENERATION) if folder is not None else None for folder in folders)
        if own is None or of_donor is not None:
            return []
        generation, config = read_json(own), self.config(self.model.config)
        stale = [key for key, value in generation.items() if NUMBER.search(key) and value != config.get(key)]
        return [f"{GENERATION} is the model's, and {', '.join(stale)} may be numbers of its own tokens"] * bool(stale)

    def _counterpart(self, spec: TensorSpec) -> TensorSpec | None:
        """Return the donor's matrix that says of tokens what one of the model's does: its embedding, or its head."""
        own = matrices(self.donor)
        own.sort(key=lambda each: tied_weights.NUMBER.search(each.name) is not None)  # those of no layer first
        embeddings = [each for each in own if tied_weights.is_embedding(each.name)]
        heads = [each for each in own if tied_weights.is_head(each.name)]
        kind = heads if tied_weights.is_head(spec.name) and not self._is_tied(spec) and heads else embeddings
        return next((each for each in kind if each.name == spec.name), kind[0] if kind else None)

    def _is_tied(self, spec: TensorSpec) -> bool:
        return tied_weights.repeated_by(spec.name, self.model.tensors, self.model.config) is not None

    def _width(self, other: Tokenizer, donor_rows: int) -> int:
        """Return the number of rows: the donor's, or its tokens padded to a multiple. Raises PlanError."""
        needed, known = max(other.tokens) + 1, max(donor_rows, len(other.tokens))
        try:
            return width_of(self.donor.reference, needed, known, donor_rows, self.multiple)
        except VocabularyError as error:
            raise PlanError([str(error)]) from error

    def _pieces(self, rows: int) -> dict[int, tuple[int, ...]]:
        """Return for each row of the output that the model lacks what its own tokenizer cuts the token into."""
        assert self.model.tokenizer_folder is not None
        path = small_file(self.model.tokenizer_folder, "tokenizer.json")
        assert path is not None
        try:
            subwords = Subwords(path, self.own, rows)
        except CheckpointError as error:
            raise PlanError([str(error)]) from error
        missing = np.flatnonzero(self.match.is_token & (self.match.rows < 0)).tolist()
        cut = {number: subwords.pieces(self.other.as_compared(number, in_bytes=True)) for number in missing}
        return {number: pieces for number, pieces in cut.items() if pieces}

    def _with_rows(
        self, spec: TensorSpec, counterpart: TensorSpec | None, cut: Mapping[int, tuple[int, ...]]
    ) -> TensorSpec:
        """Return one of the model's matrices with the output's rows."""
        rows = self.match.rows
        matrix, row = np.where(rows >= 0, 0, -1).astype(np.int32), np.where(rows >= 0, rows, 0).astype(np.int32)
        means: dict[tuple[Place, ...], int] = {(): 0}  # of nothing: zeros, until they are rebuilt
        for number, pieces in cut.items():
            place = tuple((0, piece) for piece in pieces)
            matrix[number] = -1 - means.setdefault(place, len(means))
        kept = gathered(spec, [spec], Places(matrix, row, tuple(means)))
        missing = np.array([at for at in np.flatnonzero(rows < 0).tolist() if at not in cut], np.int32)
        by_rows = self.method in ("omp", "nearest") and counterpart is not None and len(spec.shape) > 1
        has = self.match.is_token[missing] & (missing < self.donor_rows)
        targets = np.where(has if by_rows else False, missing, NOBODY).astype(np.int32)
        shared = self.match.shared
        sharing = Sharing(spec, counterpart or spec, rows[shared], shared if counterpart is not None else rows[shared])
        if not len(shared):
            missing, targets = missing[:0], targets[:0]  # subword alone: what can't be cut is zeros
        return rebuilt(kept, sharing, missing, targets, self.method if by_rows else MEAN, self.k)

    def _notes(self, of_donor: Sequence[TensorSpec], cut: Mapping[int, tuple[int, ...]]) -> list[str]:
        how = {
            "omp": f"rebuilt as sums of {self.k} rows (omp)",
            "nearest": f"rebuilt as means of the {self.k} nearest rows",
            "subword": f"the means of their pieces in {self.model.reference}'s tokenizer ({len(cut):,}), else of all",
            "mean": "the mean of the shared ones",
        }[self.method]
        notes = self.match.told(self.model.reference, self.donor.reference, how)
        notes += on_digits(self.own, self.other)
        if len(self.match.shared) and self.method in ("omp", "nearest"):
            width = max(spec.numel // spec.shape[0] for spec in of_donor)
            atoms = sum(len(self.match.shared) * spec.numel // spec.shape[0] * 2 for spec in of_donor)
            basis = rows_at_once(width, self.k) * self.k * width * 8 if self.method == OMP else 0
            notes.append(
                f"rebuilding takes {(atoms * 1.2) / 1e6:,.0f} MB besides, for the rows of shared tokens, and "
                f"{(2 * basis + 1e8) / 1e6:,.0f} MB for each worker"
            )
        return notes


def _rows(checkpoint: Checkpoint, specs: Sequence[TensorSpec]) -> tuple[int, list[str]]:
    """Return how many rows a model's vocabulary has, and what is wrong with it."""
    counts = {spec.shape[0] for spec in specs if spec.shape}
    if len(counts) == 1:
        return counts.pop(), []
    listed = ", ".join(f"{spec.name} {list(spec.shape)}" for spec in specs) or "it has none"
    return 0, [f"{checkpoint.reference}: its embedding and head differ in their rows ({listed})"]
