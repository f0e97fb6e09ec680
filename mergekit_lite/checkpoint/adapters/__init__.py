"""LoRA adapters of peft: which tensors of a base they change, and how."""
