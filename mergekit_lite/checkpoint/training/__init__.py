"""Training checkpoints, as trainers on many processes write them: folders that hold a model in pieces.

``opening`` recognises them; ``distributed`` and ``safetensors_shards`` read those of ``torch.distributed.checkpoint``,
``zero`` those of DeepSpeed. Each puts tensors together from where their pieces lie (``encodings/tiled.py``).
"""

from mergekit_lite.checkpoint.training.opening import open_training
from mergekit_lite.checkpoint.training.safetensors_shards import check_whole
from mergekit_lite.checkpoint.training.state import State

__all__ = ["State", "check_whole", "open_training"]
