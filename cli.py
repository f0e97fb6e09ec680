"""Run the command line from a checkout: ``python cli.py extrapolate sft.pt dpo.pt --alpha 0.3``."""

import sys
from pathlib import Path

try:
    from mergekit_lite.__main__ import start

    start()
except ModuleNotFoundError as error:
    if (error.name or "mergekit_lite").partition(".")[0] == "mergekit_lite":
        raise
    here = Path(__file__).resolve().parent
    sys.exit(f"This Python lacks {error.name}. Install what is needed: {sys.executable} -m pip install -e {here}")
