"""The tabs of the page, and what they have in common."""
