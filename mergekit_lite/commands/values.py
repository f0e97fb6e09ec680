"""Option values that the command line writes in a form of its own."""

from __future__ import annotations

import math
from pathlib import Path

from click import BadParameter, Context

BYTES = {"": 1, "b": 1} | {
    prefix + unit: base**power
    for power, prefix in enumerate(("k", "m", "g", "t"), start=1)
    for unit, base in (("", 1000), ("b", 1000), ("ib", 1024))
}


def number(text: str) -> float:
    """Parse a finite number. Raises BadParameter."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise BadParameter(f"{text!r} is not a number.")
    return value


def numbers(_context: object, _option: object, text: str | None) -> tuple[float, ...]:
    """Parse ``0.3``, or several numbers with commas; none where the option isn't given."""
    return () if text is None else tuple(number(part) for part in text.split(","))


def alphas_for(_context: object, _option: object, texts: tuple[str, ...]) -> dict[str, float]:
    """Parse ``REGEX=ALPHA``, each; split at the last equals sign."""
    rules: dict[str, float] = {}
    for text in texts:
        pattern, equals, alpha = text.rpartition("=")
        if not equals or not pattern:
            raise BadParameter(f"{text!r} should be REGEX=ALPHA, for instance 'norm=0'.")
        if pattern in rules:
            raise BadParameter(f"{pattern!r} is given twice.")
        rules[pattern] = number(alpha)
    return rules


def names(_context: object, _option: object, text: str | None) -> str:
    """Parse ``hf`` or ``hf=FOLDER``; return what it puts before a reference, which is empty where it isn't given."""
    if text is None:
        return ""
    if not (text == "hf" or text.removeprefix("hf=") not in (text, "")):
        raise BadParameter(f"{text!r} should be hf, or hf=FOLDER with the folder of the config.")
    return f"{text}:"


def moved(_context: object, _option: object, texts: tuple[str, ...]) -> dict[str, str]:
    """Parse ``OLD=NEW``, each; split at the first equals sign."""
    places: dict[str, str] = {}
    for text in texts:
        old, equals, new = text.partition("=")
        if not (old and equals and new):
            raise BadParameter(f"{text!r} should be OLD=NEW, for instance './base=/models/base'.")
        if old in places:
            raise BadParameter(f"{old!r} is given twice.")
        places[old] = new
    return places


def parameters(_context: object, _option: object, texts: tuple[str, ...]) -> dict[str, object]:
    """Parse ``NAME=VALUE``, each; a value is read as YAML: ``0.5``, ``true``, ``l1``."""
    import yaml

    parsed: dict[str, object] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name or name in parsed:
            raise BadParameter(f"{text!r} should be NAME=VALUE, each name once, for instance 'density=0.2'.")
        try:
            parsed[name] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, LookupError, RecursionError) as error:  # what PyYAML raises of odd tags
            raise BadParameter(f"{text!r}: the value can't be read: {error}") from error
    return parsed


def size(_context: object, _option: object, text: str | None) -> int | None:
    """Parse a number of bytes: ``5GB``, ``500 MB``, ``2GiB``, ``1000000``."""
    if text is None:
        return None
    digits = text.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    unit = BYTES.get(text[len(digits) :].strip().lower())
    try:
        count = int(float(digits) * (unit or 0))
    except (ValueError, OverflowError):
        count = 0
    if count <= 0:
        raise BadParameter(f"{text!r} is not a size; expected for instance 5GB, 500MB or 2GiB.")
    return count


def rate(_context: object, _option: object, text: str | None) -> float | None:
    """Parse gigabytes a second, ``1.25``; return bytes a second."""
    if text is None:
        return None
    if (value := number(text)) <= 0:
        raise BadParameter(f"{text!r} is no rate: expected gigabytes a second, for instance 1.25.")
    return value * 1e9


def rates(context: object, option: object, text: str | None) -> tuple[float, float] | None:
    """Parse one rate for both ways, or two with a comma: ``2``, ``3,1.5``; return bytes a second."""
    if text is None:
        return None
    parsed = [rate(context, option, part) for part in text.split(",")]
    if len(parsed) > 2:
        raise BadParameter(f"{text!r} should be one rate, or two: reading and writing.")
    return parsed[0] or 0.0, parsed[-1] or 0.0


def check_folder(path: Path | None) -> None:
    """Raise BadParameter where a file can't be written because its folder doesn't exist."""
    if path is not None and not path.resolve().parent.is_dir():
        raise BadParameter(f"{path}: there is no folder {path.parent}. Make it first.")


def stream(context: Context, _option: object, given: bool) -> None:
    """Read hub models by range while the command runs, where that is asked for."""
    if given:
        from mergekit_lite.checkpoint.hub import streamed

        context.with_resource(streamed())


def fetch_cache(context: Context, _option: object, text: str | None) -> None:
    """Keep what is fetched while the command runs, up to a size, where that is asked for."""
    nbytes = size(context, _option, text)
    if nbytes is not None:
        from mergekit_lite.checkpoint.stores.cache import caching

        context.with_resource(caching(nbytes))
