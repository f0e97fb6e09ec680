"""Asking language models and judging their answers: shared by ``distill`` and ``boost``.

    prompts ─▶ respondent (a server, or a model in this process) ─▶ answers ─▶ scorers ─▶ scores

Rows that are made one at a time are stored in ledgers, files that a killed run goes on with. transformers, httpx2 and
torch are imported where they are used.
"""
