"""Mixtures with fewer experts: which are alike or little used, and what is kept or merged of them."""
