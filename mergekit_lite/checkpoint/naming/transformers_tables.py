"""What transformers calls tensors once they are loaded, by its own tables, where it is installed.

transformers reads names of several of its versions: ``vit.encoder.layer.0.attention.attention.query.weight`` of the
hub's file becomes ``vit.layers.0.attention.q_proj.weight``. So two models fit together if they become the same. The
tables go by the modules of a model; to see those, the model is made without its weights (on the device ``meta``), by
transformers' own classes alone. That takes seconds, so it is done only for names that don't fit otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from mergekit_lite.checkpoint.naming import matching
from mergekit_lite.checkpoint.naming.matching import Naming
from mergekit_lite.checkpoint.tensor import TensorSpec

Config = Mapping[str, Any]

COUNTS = re.compile(r"layers?(_|$)|depth|stages|experts|blocks")  # settings that say how many modules there are
MOST = 2000  # modules of a kind; a config that promises more is not made into a model
# What would load code, kernels or quantisation libraries when a model is made.
LEFT_OUT = ("auto_map", "attn_implementation", "experts_implementation", "quantization_config", "compression_config")


def match_names(
    own: Mapping[str, TensorSpec], config: Config | None, other: Mapping[str, TensorSpec], other_config: Config | None
) -> Naming | None:
    """Return the names in another model of a model's tensors, as far as transformers loads both under one name.

    None where it isn't installed, or knows none of the names.
    """
    loaded, others = loaded_names(own, config), loaded_names(other, other_config)
    if loaded is None or others is None or (loaded == _same(own) and others == _same(other)):
        return None
    back = {loaded_name: name for name, loaded_name in others.items()}
    by_loaded = {loaded_name: name for name, loaded_name in loaded.items()}
    if len(back) < len(others) or len(by_loaded) < len(loaded):
        return None  # several tensors become one
    matched = matching.match_names(
        {loaded_name: own[name].shape for loaded_name, name in by_loaded.items()},
        {loaded_name: other[name].shape for loaded_name, name in back.items()},
    )
    paired = {name: back[matched.names[new]] for name, new in loaded.items() if matched.names[new] in back}
    return Naming(matching.with_followers(paired, own, other))


def _same(names: Iterable[str]) -> dict[str, str]:
    return {name: name for name in names}


def loaded_names(names: Iterable[str], config: Config | None) -> dict[str, str] | None:
    """Return what each name becomes; None where transformers isn't there, or doesn't know the architecture."""
    architectures = (config or {}).get("architectures")
    if not isinstance(architectures, list) or not architectures or not _is_small(config):
        return None
    try:
        import torch
        import transformers
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key

        architecture = getattr(transformers, str(architectures[0]), None)
        if not (isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel)):
            return None
        config_class: Any = architecture.config_class
        settings = config_class.from_dict(_plain(config))
        if getattr(settings, "backbone", None) or getattr(settings, "use_pretrained_backbone", False):
            return None  # that would be downloaded
        logging: Any = transformers.logging
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # it would remark on a config's other settings
        try:
            with torch.device("meta"):
                made: Any = architecture(settings)
        finally:
            logging.set_verbosity(verbosity)
        renamings = [each for each in get_model_conversion_mapping(made) if isinstance(each, WeightRenaming)]
        return {name: rename_source_key(name, renamings, [])[0] for name in names}
    except Exception:  # these functions are transformers' own affair, so a version of it may lack or change them
        return None


def _plain(config: Any) -> Any:
    """Return a config without what isn't about the model's modules."""
    if not isinstance(config, Mapping):
        return config
    return {key: _plain(value) for key, value in config.items() if key not in LEFT_OUT and not key.startswith("_")}


def _is_small(config: Any) -> bool:
    """Return whether no number of modules in a config, which may be anybody's, is beyond reason."""
    if not isinstance(config, Mapping):
        return True
    for key, value in config.items():
        counts = value if isinstance(value, list) else [value]
        if not _is_small(value) or (
            COUNTS.search(key) and any(isinstance(each, int) and each > MOST for each in counts)
        ):
            return False
    return True
