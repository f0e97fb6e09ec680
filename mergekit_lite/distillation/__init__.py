"""Distill strong models into a small one by preferences: WRPO and FuseChat-3.0, from prompts to a trained model.

    recipe ─▶ sample ─▶ score ─▶ pair ─▶ train ─▶ report

Each stage reads files and writes files in the recipe's folder (``folder.py``) and goes on where it stopped.
"""
