"""Choose alpha, or any number of a merge recipe, by measuring.

    search ─▶ numbers ─▶ bench: weights set in place, answers, scores ─▶ study ─▶ statistics, guards ─▶ search …
                                                                          └─▶ choice ─▶ report

    candidates/   what is tuned, and the plan of a candidate
    search/       which candidates are tried, what is kept of them, which one is chosen
    measure/      weights set in place, answers, scores

The search is pure: it asks for points and is told what came of them. The study keeps every measured row, so that
nothing is measured twice. ``search`` and ``measure`` don't know each other: between them is one protocol,
``candidate.Bench``. ``request`` checks what is asked for, ``boosting`` puts it together, ``report`` tells.
"""
