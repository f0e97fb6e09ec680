"""Distill strong models into a small one by preferences: WRPO and FuseChat-3.0, from prompts to a trained model.

    recipe ─▶ sample ─▶ score ─▶ pair ─▶ train ─▶ report

Each stage is a function in the file of its name. It reads and writes files in the recipe's folder (``folder.py``) and
resumes where it stopped. The parts of a stage have a folder of their own:

    recipe/       the recipe, loaded from YAML and checked
    data/         data in the place of a stage, and rows for other tools
    pairing/      parts of ``pair``; the published rules for pairs are in ``rules.py``
    training/     parts of ``train``; the published losses are in ``objectives.py``
    reporting/    parts of ``report``

``prompts.py``, ``settings.py`` and ``reporter.py`` serve several stages; ``dry_run.py`` counts what they would do.
"""
