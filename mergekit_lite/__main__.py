"""The process `mergekit-lite`, which `python -m mergekit_lite` starts as well."""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing can be lost yet: it ends without a traceback

from mergekit_lite.commands import start

if __name__ == "__main__":
    start()
