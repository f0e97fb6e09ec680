"""What an adapter changes of a model's vocabulary and heads, and what the model's config has to say then.

- An embedding that a head is tied to: peft's forward changes the embedding alone, so the head becomes a tensor of its
  own. With ``ensure_weight_tying`` the adapter's file has both. Rows of single tokens are changed in both.
- Vocabularies of another size: the adapter's rows, all of them, and ``vocab_size``.
- Heads for a task (``task_type``), in place of the head of the language model.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from mergekit_lite import dtypes
from mergekit_lite.checkpoint import tied_weights
from mergekit_lite.checkpoint.adapters.config import MERGE_IT
from mergekit_lite.checkpoint.folded import Folded
from mergekit_lite.checkpoint.tensor import TensorSpec
from mergekit_lite.errors import CheckpointError

Config = Mapping[str, Any]

TASKS = {  # by task_type, the end of the class's name in transformers
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
TASK_HEAD = re.compile(r"(score|classifier|pre_classifier|qa_outputs)\.(.+\.)?(weight|bias)")
LANGUAGE_HEADS = ("cls.", "lm_head.", "vocab_layer_norm.", "vocab_projector.", "vocab_transform.")
TABLES = {  # transformers' own, of the classes by model_type
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
}
DECODERS, ENCODERS = ("ForCausalLM", "LMHeadModel"), ("ForMaskedLM", "ForPreTraining", "Model")  # without such heads
WITH_HEAD = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")  # whose head is ``lm_head``
MAY_BE_TIED = (*WITH_HEAD, "ForMaskedLM", "ForPreTraining")
# Layers between the model and the head for sequences that some models have, and that no language model has.
BETWEEN = {"albert": "pooler", "bert": "pooler", "deberta": "pooler", "deberta-v2": "pooler",
           "distilbert": "pre_classifier", "xlnet": "sequence_summary"}  # fmt: skip
UNTIE_IT = (
    "Untie the base first (give it an output head of its own, and tie_word_embeddings false in its config), "
    "or train with ensure_weight_tying"
)


class Replaced(NamedTuple):
    """A tensor of the base that an adapter replaces in full."""

    name: str  # of the base
    by: TensorSpec
    own: TensorSpec  # the base's; of a head that it ties, the embedding


def task_heads(
    replacements: Mapping[str, TensorSpec], base: Mapping[str, TensorSpec], task: str | None
) -> dict[str, TensorSpec]:
    """Return those full tensors of an adapter that are a head for its task, and that the base lacks in this shape."""
    return {
        name: spec
        for name, spec in replacements.items()
        if task in TASKS and TASK_HEAD.fullmatch(name) and (name not in base or base[name].shape != spec.shape)
    }


def with_task_head(folded: Folded, heads: Mapping[str, TensorSpec], task: str, scale: float) -> Folded:
    """Return a model with a head for a task in place of that of the language model.

    Args:
        folded: the model; ``architectures`` of its config say which class it is now.
        heads: the tensors of the head by name.
        task: what the head is for, one of ``TASKS``.
        scale: what the adapter is multiplied by.

    Raises:
        CheckpointError: it isn't known which class the model becomes, that class has layers that are stored nowhere, or
            the adapter is scaled.
    """
    tensors, config = folded.tensors, dict(folded.config or {})
    first = next(iter(heads.values()))
    if whole := [spec for spec in heads.values() if not dtypes.is_float(spec.dtype)]:
        raise CheckpointError(f"{whole[0].name}: is {whole[0].dtype}, which is not for arithmetic")
    if scale != 1:
        raise CheckpointError(f"{first.name}: is a head that the base doesn't have, so it can't be scaled by {scale:g}")
    new = _class_for(task, config)
    if new is None:
        named = ", ".join(map(str, config.get("architectures") or ["none"]))
        raise CheckpointError(
            f"{first.name}: is a head for {task}, and architectures in the config of the base ({named}) don't say "
            f"which class of transformers has it under the base's names. {MERGE_IT}"
        )
    between = BETWEEN.get(str(config.get("model_type"))) if task == "SEQ_CLS" else None
    if between and not any(f".{between}." in f".{name}" for name in (*tensors, *heads)):
        raise CheckpointError(
            f"{first.name}: is a head behind the layer {between!r}, which neither the base nor the adapter has: its "
            f"values in training aren't stored. {MERGE_IT}"
        )
    language = [name for name in tensors if tied_weights.is_head(name) or name.startswith(LANGUAGE_HEADS)]
    embeddings = [spec for name, spec in tensors.items() if tied_weights.is_embedding(name)]
    dtype = embeddings[0].written_as or embeddings[0].dtype if embeddings else None
    own = {name: replace(spec, name=name, written_as=dtype or spec.dtype) for name, spec in heads.items()}
    return Folded(
        {name: spec for name, spec in tensors.items() if name not in language} | own,
        _for_task(config, new, heads) if task != "QUESTION_ANS" else config | {"architectures": [new]},
        {
            **folded.left_out,
            **{f"{name} of the base": f"the output is {new}, which has no such head" for name in language},
        },
        (*folded.notes, f"the adapter has a head of its own ({', '.join(own)}): the output is {new}"),
    )


def _class_for(task: str, config: Config) -> str | None:
    """Return the class of transformers that a model becomes with a head for a task; None where that isn't known.

    transformers' own table decides where it is installed; else the class of the base with another ending.
    """
    old = str((config.get("architectures") or [""])[0])
    # Decoders that answer questions have other names in transformers than those that speak.
    kinds = (TASKS[task], *(ENCODERS if task == "QUESTION_ANS" else (*DECODERS, *ENCODERS)))
    kind = next((kind for kind in kinds if old.endswith(kind)), None)
    if kind is None:
        return None
    kind_of_model = config.get("model_type")
    try:
        from transformers.models.auto import modeling_auto
    except ImportError:
        kind_of_model = None
    if kind_of_model is None:
        return old.removesuffix(kind) + TASKS[task]
    known: str | tuple[str, ...] | None = getattr(modeling_auto, TABLES[task], {}).get(kind_of_model)
    return known[0] if isinstance(known, tuple) else known


def _for_task(config: Config, kind: str, heads: Mapping[str, TensorSpec]) -> dict[str, Any]:
    """Return a config for a class with a head of labels, as many as the head has rows."""
    changed = dict(config) | {"architectures": [kind]}
    rows = [spec.shape[0] for name, spec in heads.items() if name.endswith("weight") and len(spec.shape) == 2]
    if rows and len(config.get("id2label") or ()) != rows[-1]:
        changed.pop("num_labels", None)
        changed["id2label"] = {str(number): f"LABEL_{number}" for number in range(rows[-1])}
        changed["label2id"] = {f"LABEL_{number}": number for number in range(rows[-1])}
    return changed


def untied(
    folded: Folded, changed: Collection[str], base: Mapping[str, TensorSpec], replaced: Collection[Replaced]
) -> Folded:
    """Return a model in which heads are tensors of their own that changed embeddings no longer stand in for.

    Args:
        folded: the model with the adapter, and the config of the base.
        changed: the names of the tensors that the adapter changes, but for rows of single tokens.
        base: the model without it.
        replaced: what the adapter has in full. An embedding with factors may be stored with them, and is the head then.

    Raises:
        CheckpointError: the base ties a head whose name isn't known.
    """
    config = folded.config or {}
    embeddings = sorted(filter(tied_weights.is_embedding, changed))
    classes = [str(name) for name in config.get("architectures") or ()]
    is_tied = not any(map(tied_weights.is_head, folded.tensors)) and config.get("tie_word_embeddings") is not False
    if not embeddings or not is_tied or (classes and not classes[0].endswith(MAY_BE_TIED)):
        return folded
    if len(embeddings) > 1 or config.get("is_encoder_decoder") or (classes and not classes[0].endswith(WITH_HEAD)):
        raise CheckpointError(
            f"{embeddings[0]}: the base ties its output head to it, the adapter changes it alone, and the name of a "
            f"head of its own isn't known for {', '.join(classes) or 'this model'}. {UNTIE_IT}"
        )
    name = embeddings[0]
    stored = next((each.by for each in replaced if each.name == name and ".base_layer." in each.by.name), None)
    own = replace(stored, written_as=base[name].written_as or base[name].dtype) if stored else base[name]
    head = "language_model.lm_head.weight" if name.startswith("language_model.model.") else "lm_head.weight"
    note = (
        f"the adapter changes {name} alone, which the base ties its head to: {head} stays as it was, the output is "
        "untied, its config says so"
    )
    return folded._replace(tensors={**folded.tensors, head: replace(own, name=head)}, notes=(*folded.notes, note))


def resized(folded: Folded, replaced: Collection[Replaced], has_tokens: bool) -> Folded:
    """Return a model whose config has the size of a vocabulary that an adapter resized, once all its tensors have it.

    The tokenizer isn't the base's then, nor where rows of single tokens (``has_tokens``) or a whole embedding were
    trained. Raises CheckpointError where tensors of the vocabulary differ in size.
    """
    vocabulary = [each for each in replaced if tied_weights.is_vocabulary(each.name)]
    other = [each for each in vocabulary if each.by.shape != each.own.shape]
    trained = has_tokens or any(".base_layer." not in each.by.name for each in vocabulary)
    folded = folded._replace(has_tokenizer=bool(other) or trained)
    if not other:
        return folded
    before, after = other[0].own.shape[0], other[0].by.shape[0]
    for name, spec in folded.tensors.items():
        if tied_weights.is_vocabulary(name) and spec.shape[:1] == (before,):
            raise CheckpointError(
                f"{other[0].by.name}: has {after} rows, but {name}, which the adapter doesn't have, {before}: what its "
                "rows were in training isn't stored. Save the adapter with save_embedding_layers=True; or resize the "
                "base, save it with the adapter's tokenizer, and name that"
            )
    note = f"the adapter has {after:,} rows of a vocabulary, the base {before:,}: vocab_size in the config follows"
    config = None if folded.config is None else _with_size(folded.config, before, after)
    return folded._replace(config=config, notes=(*folded.notes, note))


def _with_size(config: Config, before: int, after: int) -> dict[str, Any]:
    """Return a config with another ``vocab_size``, in nested configs too, but only where it was the same."""
    changed = dict(config)
    for key, value in config.items():
        if key == "vocab_size" and value == before:
            changed[key] = after
        elif key.endswith("_config") and isinstance(value, Mapping):
            changed[key] = _with_size(value, before, after)
    return changed
