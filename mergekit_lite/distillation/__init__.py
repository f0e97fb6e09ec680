"""Distill strong models into a small one by preferences and by distributions, from prompts to a trained model.

    recipe ─▶ sample ─▶ score ─▶ pair ─▶ teach ─▶ train ─▶ report

Each stage is a function in the file of its name. It reads and writes files in the recipe's folder (``folder.py``) and
resumes where it stopped. The parts of a stage have a folder of their own:

    recipe/       the recipe, loaded from YAML and checked
    data/         data in the place of a stage, and rows for other tools
    pairing/      parts of ``pair``; the published rules for pairs are in ``rules.py``
    alignment/    two tokenisations of one text cut into groups; one vocabulary in terms of another
    teaching/     parts of ``teach``, and the files of what teachers say
    objectives/   the published losses of preference training, and the distances to teachers
    training/     parts of ``train``
    on_policy/    the training on the student's own answers
    reporting/    parts of ``report``

``prompts.py``, ``settings.py`` and ``reporter.py`` serve several stages; ``dry_run.py`` counts what they would do.
"""
