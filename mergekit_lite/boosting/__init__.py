"""Choose alpha, or any number of a merge recipe, by measuring.

    search ─▶ params ─▶ evaluator: weights set in place, answers, scores ─▶ study ─▶ intervals, guards ─▶ search …
                                                                            └─▶ choice ─▶ report

    candidates/   what is tuned, and the plan of a candidate
    search/       which candidates are tried, the study that stores their rows, which one is chosen
    measure/      weights set in place, answers, scores

The search is pure: it yields params and is sent their outcome. ``search`` and ``measure`` don't know each other:
between them is one protocol, ``candidate.Evaluator``.
"""
