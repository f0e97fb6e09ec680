"""Answers that several models make together: drafts, and what is made of them, layer by layer.

    conversation ─▶ layer: drafts ─▶ layer: drafts ─▶ … ─▶ the last layer's one draft is the answer

Mixture-of-Agents, Self-MoA and Archon are such lists of layers (docs/answer.md). A step is a generator that yields the
calls it makes of models and is sent their replies (``steps.py``); ``running.py`` makes the calls of all prompts.
"""
