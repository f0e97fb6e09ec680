"""The parts of the report stage: answers to held-out prompts, what follows from them, curves, Markdown and HTML."""
