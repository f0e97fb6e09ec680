"""What merges with activations need to know of a model: it reads prompts, and statistics of that are written."""
