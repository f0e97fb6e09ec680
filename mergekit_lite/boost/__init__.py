"""Choose alpha, or any number of a merge recipe, by measuring.

    search ─▶ numbers ─▶ bench: weights set in place, answers, scores ─▶ study ─▶ statistics, guards ─▶ search …
                                                                          └─▶ choice ─▶ report

The search is pure: it asks for points and is told what came of them. The study keeps every measured row, so that
nothing is measured twice. What knows models is behind one protocol, ``candidate.Bench``.
"""
