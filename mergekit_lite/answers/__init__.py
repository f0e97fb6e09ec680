"""Asking language models and judging what they answer: shared by ``distill`` and ``boost``.

    prompts ─▶ source (a server, or a model in this process) ─▶ answers ─▶ scorers ─▶ scores

What is made one row at a time lies in ledgers, files that a killed run goes on with. transformers, openai and torch are
imported where they are used.
"""
