"""Answers of a model that is not written yet: those of ALIGNED + alpha·(ALIGNED − SFT), mixed from logits.

opened ─▶ readers ─▶ Drafts: logits mixed, a token drawn for every alpha at once ─▶ answers
                        └─▶ search: every few tokens the drafts that ALIGNED prefers go on
"""
