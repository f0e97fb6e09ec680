"""`python -m mergekit_lite` is the command `mergekit-lite`."""

from mergekit_lite.commands import start

start()
