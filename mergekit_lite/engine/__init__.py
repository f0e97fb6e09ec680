"""The engine: runs a plan, block by block, on the cores of a CPU or the streams of a GPU."""
