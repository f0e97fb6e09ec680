"""Training checkpoints, as trainers on many processes write them: folders that hold a model in pieces.

``found`` recognises them, ``distributed`` reads those of ``torch.distributed.checkpoint``, ``zero`` those of DeepSpeed.
"""

from mergekit_lite.checkpoint.training.opening import open_training
from mergekit_lite.checkpoint.training.state import State

__all__ = ["State", "open_training"]
