"""Numbers of tokens in a config: those of another vocabulary, and those that another config has otherwise."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

NUMBER = re.compile(r"_token_(id|ids|index)$")
SPECIAL_NUMBERS = ("bos_token_id", "eos_token_id", "pad_token_id")
OF_TEXT = ("text_config", "language_config", "llm_config")


def with_numbers_of(
    config: Mapping[str, Any], donor: Mapping[str, Any], rows: int | None, numbers: Mapping[int, int] | None
) -> dict[str, Any]:
    """Return a config for another vocabulary.

    Args:
        config: the model's; nested configs of text follow, too.
        donor: the config of the model that gives the tokenizer: what it numbers has its numbers.
        rows: of the vocabulary; None where they stay.
        numbers: where the model's other tokens are now; one that is gone is None in the config. None where all stay.
    """
    of_text: Mapping[str, Any] = next((donor[key] for key in OF_TEXT if isinstance(donor.get(key), dict)), {})
    given = {key: value for key, value in {**of_text, **donor}.items() if NUMBER.search(key)}
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if key == "vocab_size" and rows is not None:
            changed[key] = rows
        elif key in OF_TEXT and isinstance(value, dict):
            fitting = {name: at for name, at in {**donor, **of_text}.items() if name in value or name not in config}
            changed[key] = with_numbers_of(value, fitting, rows, numbers)
        elif NUMBER.search(key):
            changed[key] = given[key] if key in given else _moved(value, numbers)
        else:
            changed[key] = value
    has_text = any(isinstance(config.get(key), dict) for key in OF_TEXT)
    return changed if has_text else changed | {key: given[key] for key in given if key not in config}


def _moved(value: Any, numbers: Mapping[int, int] | None) -> Any:
    if numbers is None or isinstance(value, bool):
        return value
    if isinstance(value, list):
        moved = [numbers[each] for each in value if isinstance(each, int) and each in numbers]
        return moved or None
    return numbers.get(value) if isinstance(value, int) else value


def other_numbers(generation: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Return the special tokens that a generation config numbers otherwise than a model's config.

    It may have more than the config: several tokens to end at.
    """
    return [
        key
        for key in SPECIAL_NUMBERS
        if key in generation and config.get(key) is not None and not _listed(config[key]) <= _listed(generation[key])
    ]


def _listed(numbers: Any) -> set[str]:
    return {repr(number) for number in (numbers if isinstance(numbers, list) else [numbers])}
