"""Planning a mixture: the tensors of dense models under a family's names, and routers; from headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from mergekit_lite.checkpoint import Checkpoint, TensorSpec
from mergekit_lite.checkpoint.encodings.dense import Dense
from mergekit_lite.checkpoint.encodings.drawn import Gaussian, Given, Uniform, unstored
from mergekit_lite.checkpoint.encodings.sum import Term
from mergekit_lite.checkpoint.encodings.views import joined, side_by_side
from mergekit_lite.checkpoint.naming.alignment import shown_as, unwrapped
from mergekit_lite.checkpoint.optional_tensors import why_optional
from mergekit_lite.errors import PlanError, counted
from mergekit_lite.layout import OutputPath, is_single_file, output_path
from mergekit_lite.mixtures.building.config import mixture_config
from mergekit_lite.mixtures.building.dense import (
    backbone,
    config_problems,
    families_named,
    kind_of,
    layers_of,
    misfits,
    unusable,
)
from mergekit_lite.mixtures.building.recipe import RANDOM, Expert, MixtureRecipe
from mergekit_lite.mixtures.families import ROLES, Family, Role, dense
from mergekit_lite.mixtures.remade import alike
from mergekit_lite.planning import Job, Plan
from mergekit_lite.planning.front_matter import carried_over
from mergekit_lite.planning.matching import arranged, output_dtype
from mergekit_lite.planning.planner import SHARD_SIZE, opened_models

METHOD = "moe"  # what manifests and cards call it
UNUSED = "of an expert only the MLPs are used"

Rows = Mapping[str, bytes]  # routers by their names: values of their dtype, row by row


@dataclass(frozen=True)
class MixturePlan:
    """A plan of a mixture, and which of its tensors are rows that are still to be computed.

    Attributes:
        plan: the plan; rows that are to be computed are zeros in it.
        recipe: what was asked for.
        family: of the mixture.
        base: the model whose hidden states or embeddings rows are made of, under its own names.
        routers: the jobs of routers by name, with the layer, and whether it is that of the shared expert.
        equal_experts: whether experts that are all the same were accepted.
    """

    plan: Plan
    recipe: MixtureRecipe
    family: Family
    base: Checkpoint
    routers: Mapping[str, tuple[int, bool]]
    equal_experts: bool

    @property
    def needs_rows(self) -> bool:
        """Whether rows have to be computed before the plan can run."""
        return self.recipe.gate_mode not in RANDOM

    def with_rows(self, rows: Rows) -> Plan:
        """Return the plan with rows that were computed; routers without any stay zeros."""
        jobs = [
            replace(job, inputs=(_given(job, rows[job.name]),)) if job.name in rows and self.needs_rows else job
            for job in self.plan.jobs
        ]
        return replace(self.plan, jobs=tuple(jobs))


def plan_mixture(
    recipe: MixtureRecipe,
    output: str | OutputPath,
    *,
    text: str,
    shard_size: int | None = None,
    opened: Mapping[str, Checkpoint] | None = None,
    equal_experts: bool = False,
) -> MixturePlan:
    """Resolve the recipe of a mixture against its models' headers.

    Args:
        recipe: the recipe.
        output: a folder, or a single file; or the URL of such a place in an object store.
        text: the recipe's own text, which travels with the output.
        shard_size: most bytes of data in one file; 5 GB by default.
        opened: models that are open already, by reference.
        equal_experts: whether experts that are all the same were accepted, for the manifest.

    Raises:
        CheckpointError: models can't be opened.
        PlanError: the models don't fit together, or no family fits them; every problem is named.
    """
    inputs = opened_models(recipe.models, opened or {})
    base = unwrapped(inputs[0])
    inputs = (base, *(shown_as(each, base) for each in inputs[1:]))
    if problems := [each.of_several for each in inputs if each.is_of_several]:
        raise PlanError(problems)
    if recipe.gate_mode not in RANDOM and base.tokenizer_folder is None:
        needs = f"is a single file, with no tokenizer for the prompts of gate_mode {recipe.gate_mode}: name its folder"
        raise PlanError([f"{base.reference}: {needs}"])
    family = _family(recipe, inputs)
    making = _Making(recipe, family, inputs)
    jobs = making.jobs()
    if making.problems:
        raise PlanError(list(dict.fromkeys(making.problems)))
    path = output_path(output)
    names = [job.name for job in jobs]
    layout = arranged(jobs, base, path, shard_size or SHARD_SIZE)
    assert len(set(names)) == len(names)
    config, notes_on_config = mixture_config(
        family, base.config or {}, experts=len(recipe.experts), per_token=recipe.experts_per_token,
        width=making.width, shared=making.shared_widths, has_bias=any(name.endswith("proj.bias") for name in names),
    )  # fmt: skip
    front_matter, notes_on_card = ({}, []) if is_single_file(path) else carried_over(base)
    notes = [*map(str, recipe.notes), *(note for each in inputs for note in each.notes), *making.notes]
    written = {"merge_method": METHOD, "text": text} | ({"equal_experts": True} if equal_experts else {})
    plan = Plan(
        recipes=(written,),
        inputs=inputs,
        config_source=0,
        jobs=tuple(jobs),
        left_out=tuple(_left_out(inputs, making.read)),
        layout=layout,
        outputs=(path,),
        seed=recipe.seed,
        out_dtype=recipe.dtype,
        config=config,
        front_matter=front_matter,
        text=text,
        shard_size=shard_size,
        notes=(*notes, *notes_on_config, *notes_on_card, *_notes_on_family(family)),
    )
    return MixturePlan(plan, recipe, family, base, making.routers, equal_experts)


def _family(recipe: MixtureRecipe, inputs: Sequence[Checkpoint]) -> Family:
    """Return the family of the mixture: the first one that fits. Raises PlanError with why none does."""
    named = families_named(recipe.architecture)
    drawn = recipe.gate_mode in RANDOM
    gated = drawn or all(each.positive for each in recipe.shared)
    has_prompts = any(each.positive or each.negative for each in recipe.shared)
    whys: dict[str, list[str]] = {}
    for family in named:
        why = list(misfits(family, inputs, len(recipe.shared), gated))
        if family.shared and not family.shared_gate and has_prompts and not drawn:
            why.append(f"{family.title} has no router for shared experts: they take no prompts")
        if not why:
            return family
        whys[family.model_type] = why
    kind = kind_of(inputs[0])
    close = [family for family in named if kind in family.made_from]  # what is said of the others is that, once more
    if not close:
        known = "; ".join(f"{family.title} from {', '.join(family.made_from)}" for family in named)
        raise PlanError([f"{inputs[0].reference} is of type {kind or 'unknown'}: mixtures are made as {known}"])
    raise PlanError([problem for family in close for problem in whys[family.model_type]])


@dataclass
class _Making:
    """The making of a mixture's jobs, layer by layer."""

    recipe: MixtureRecipe
    family: Family
    inputs: Sequence[Checkpoint]
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    routers: dict[str, tuple[int, bool]] = field(default_factory=dict)
    read: list[set[str]] = field(default_factory=list)  # for each input, the names of what is read of it
    cast: Counter[tuple[str, str, str]] = field(default_factory=Counter)  # (model, its dtype, the output's)
    width: int = 0
    shared_widths: tuple[int, ...] = ()

    @property
    def base(self) -> Checkpoint:
        """The model that gives all but the experts."""
        return self.inputs[0]

    @property
    def hidden(self) -> int:
        """The width of hidden states."""
        return int((self.base.config or {}).get("hidden_size", 0))

    def jobs(self) -> list[Job]:
        """Return the jobs of all tensors, in the order of the layers; what is wrong is added to the problems."""
        self.read = [set() for _ in self.inputs]
        self.problems += unusable(self.base)
        if self.problems:
            return []
        names, zeros, problems = backbone(self.family, self.base)
        self.problems += problems
        self.problems += config_problems(self.family, self.base, self.inputs[1:])
        self.problems += self._unlike()
        if self.problems:
            return []
        self.width = self._spec(self.recipe.experts[0], 0, "gate").shape[0]
        self.shared_widths = tuple(self._spec(each, 0, "gate").shape[0] for each in self.recipe.shared)
        if zeros:
            said = f"{len(zeros)} biases of queries, keys and values"
            self.notes.append(f"{self.family.title} has {said} that {self.base.reference} has not: they are zeros")
        of_layers: dict[int | None, list[Job]] = {layer: [] for layer in (None, *range(layers_of(self.base)), -1)}
        for name in (*names, *zeros):
            parts = name.split(".")
            layer = int(parts[2]) if parts[1] == "layers" else None if "embed" in name else -1
            of_layers[layer].append(self._copy(name) if name in self.base.tensors else self._zeros(name))
        for layer in range(layers_of(self.base)):
            of_layers[layer] += self._experts(layer)
        self.notes += self._notes()
        return [job for jobs in of_layers.values() for job in jobs]

    def _unlike(self) -> Iterator[str]:
        """Yield where experts lack tensors, or have other shapes than the first one."""
        base, first = self.base, self.recipe.experts[0]
        for model in self.inputs:
            if layers_of(model) and layers_of(model) != layers_of(base):
                yield f"{model.reference}: has {layers_of(model)} layers, {base.reference} has {layers_of(base)}"
        used = {dense(layer, role) for layer in range(layers_of(base)) for role in ROLES}
        givers = {each.model: self._model(each) for each in (*self.recipe.experts, *self.recipe.shared)}
        for model in givers.values():
            for name, other in model.tensors.items():
                if ".mlp." in name and name not in used and not why_optional(name, other, model.tensors, model.config):
                    yield f"{model.reference}: {name} has no place in {self.family.title}"
        widths: dict[int, int] = {}
        for expert in (*self.recipe.experts, *self.recipe.shared):
            model = self._model(expert)
            for layer in range(layers_of(base)):
                for role in ROLES:
                    name = dense(layer, role)
                    if (spec := model.tensors.get(name)) is None:
                        yield f"{model.reference}: has no {name}"
                        continue
                    width = widths.setdefault(id(expert), spec.shape[1 if role == "down" else 0])
                    shape = (self.hidden, width) if role == "down" else (width, self.hidden)
                    if spec.shape != shape:
                        yield f"{model.reference}: {name} has the shape {list(spec.shape)}, expected {list(shape)}"
        first_width = widths.get(id(first))
        for expert in self.recipe.experts:
            if (own := widths.get(id(expert))) != first_width:
                yield f"{expert.model}: its MLPs are {own} wide, those of {first.model} {first_width}"
        for expert in self.recipe.shared if self.family.shared_count else ():
            if (own := widths.get(id(expert))) != first_width:
                title = self.family.title
                yield f"{expert.model}: {own} wide; {title} has shared experts as wide as others: {first_width}"

    def _model(self, expert: Expert) -> Checkpoint:
        return self.inputs[self.recipe.models.index(expert.model)]

    def _spec(self, expert: Expert, layer: int, role: Role) -> TensorSpec:
        return self._model(expert).tensors[dense(layer, role)]

    @property
    def _expert_dtype(self) -> str:
        """The dtype of MLPs and routers: the one asked for, or the base's."""
        return output_dtype(
            self.base.tensors.get(dense(0, "gate")) or next(iter(self.base.tensors.values())), self.recipe.dtype
        )

    def _job(self, name: str, spec: TensorSpec, model: int, dtype: str, why: str = "") -> Job:
        return Job(name, dtype, spec.shape, inputs=(spec,), models=(model,), why=why)

    def _copy(self, name: str) -> Job:
        spec = self.base.tensors[name]
        self.read[0].add(name)
        return self._job(name, spec, 0, output_dtype(spec, self.recipe.dtype))

    def _zeros(self, name: str) -> Job:
        weight = self.base.tensors[name.removesuffix("bias") + "weight"]
        dtype = output_dtype(weight, self.recipe.dtype)
        return self._job(name, unstored(weight, name, dtype, weight.shape[:1]), 0, dtype, "zeros")

    def _experts(self, layer: int) -> Iterator[Job]:
        family = self.family
        yield self._router(family.router(layer), layer, len(self.recipe.experts), False)
        for number, expert in enumerate(self.recipe.experts):
            for role in ROLES:
                yield self._matrix(family.expert(layer, number, role), [expert], layer, role)
        if self.recipe.shared:
            if family.shared_gate:
                yield self._router(family.shared_router(layer), layer, 1, True)
            for role in ROLES:
                yield self._matrix(family.shared_expert(layer, role), self.recipe.shared, layer, role)

    def _matrix(self, name: str, experts: Sequence[Expert], layer: int, role: Role) -> Job:
        """Return the job of an expert's matrix; of several shared experts, side by side, which adds their outputs."""
        specs = [_changed(self._spec(each, layer, role), name, number, each, role, self.recipe.seed)
                 for number, each in enumerate(experts)]  # fmt: skip
        if len(specs) == 1:
            spec = specs[0]
        elif role == "down":
            spec = side_by_side(alike(specs))
        else:
            spec = joined(alike(specs), (sum(each.shape[0] for each in specs), self.hidden))
        dtype = self._expert_dtype
        for each in experts:
            stored = self._spec(each, layer, role)
            self.read[self.recipe.models.index(each.model)].add(stored.name)
            if (stored.written_as or stored.dtype) != dtype and self.recipe.dtype is None:
                self.cast[each.model, stored.written_as or stored.dtype, dtype] += 1
        return self._job(name, spec, self.recipe.models.index(experts[0].model), dtype)

    def _router(self, name: str, layer: int, rows: int, is_shared: bool) -> Job:
        self.routers[name] = (layer, is_shared)
        dtype, shape = self._expert_dtype, (rows, self.hidden)
        like = self.base.tensors[dense(layer, "gate")]
        terms: dict[str, tuple[Term, ...]] = {
            "random": (Gaussian(self.recipe.seed, name),),
            "uniform_random": (Uniform(self.recipe.seed, name, scale=self.hidden**-0.5),),
        }
        drawn = terms.get(self.recipe.gate_mode)
        spec = unstored(like, name, "float32" if drawn else dtype, shape, *(drawn or ()))
        return self._job(name, spec, 0, dtype, f"gate_mode {self.recipe.gate_mode}")

    def _notes(self) -> Iterator[str]:
        for (model, own, dtype), number in self.cast.items():
            yield f"{counted(number, 'tensor')} of {model}: {own} is cast to {dtype}, the base's"


def _changed(spec: TensorSpec, name: str, number: int, expert: Expert, role: Role, seed: int) -> TensorSpec:
    """Return an expert's matrix as it is, or (W + noise_scale · N(0, 1)) · residual_scale, the latter for down_proj."""
    factor = expert.residual_scale if role == "down" else 1.0
    if factor == 1.0 and not expert.noise_scale:
        return spec
    terms: list[Term] = [Dense(spec, scale=factor)]
    if expert.noise_scale:
        terms.append(Gaussian(seed, f"{name}\0{number}", scale=expert.noise_scale * factor))
    dtype = "float64" if spec.dtype == "float64" else "float32"
    changed = unstored(spec, spec.name, dtype, spec.shape, *terms)
    return replace(changed, written_as=spec.written_as or spec.dtype)


def _given(job: Job, values: bytes) -> TensorSpec:
    (spec,) = job.inputs
    return unstored(spec, job.name, job.dtype, job.shape, Given(values, job.dtype))


def _left_out(inputs: Sequence[Checkpoint], read: Sequence[set[str]]) -> Iterator[tuple[str, str, str]]:
    """Return what no tensor of the output is made of, and why: (reference, name, reason)."""
    for number, model in enumerate(inputs):
        for name, spec in model.tensors.items():
            if name not in read[number]:
                why = why_optional(name, spec, model.tensors, model.config)
                yield model.reference, name, why or (UNUSED if number else "the base is no expert")
        yield from ((model.reference, name, why) for name, why in model.left_out.items())


def _notes_on_family(family: Family) -> Iterator[str]:
    if family.own_code:
        yield (
            f"transformers knows no {family.model_type}: it loads the output with the code of "
            f"{next(iter(family.own_code.values())).partition('--')[0]} alone (trust_remote_code). Servers that know "
            "the family, vLLM and llama.cpp among them, need none"
        )
