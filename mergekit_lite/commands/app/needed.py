"""A program that asks the hub what the downloads of models would take, and prints it as JSON: it downloads none."""

from __future__ import annotations

import json
import sys

from mergekit_lite.checkpoint.hub import needed
from mergekit_lite.errors import MergekitLiteError


def start() -> None:
    """Print it for the models that the command line names."""
    told: dict[str, object] = {}
    for reference in sys.argv[1:]:
        try:
            commit, files = needed(reference)
            told[reference] = {"commit": commit, "files": files}
        except MergekitLiteError as error:
            told[reference] = {"error": str(error)}
    print(json.dumps(told))
