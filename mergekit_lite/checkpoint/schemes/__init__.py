"""Schemes of quantised weights, one a file: each recognises its tensors and gives them their encodings."""
