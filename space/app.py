"""The page of mergekit_lite as a space of the hub; what visitors may do is in docs/app.md of the project."""

import sys
from pathlib import Path

from mergekit_lite.commands import start

ROOT = Path(__file__).parent / "outputs"  # what runs make

if __name__ == "__main__":
    ROOT.mkdir(exist_ok=True)
    sys.argv[1:] = ["app", "--space", "--root", str(ROOT), *sys.argv[1:]]
    start()
