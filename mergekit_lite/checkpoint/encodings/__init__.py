"""The ways in which elements are stored, one a file: each is an ``Encoding`` or, added in a sum, a ``Term``.

To add one, write its file here; the format or the recognition that meets it gives it to ``TensorSpec.encoding``.
"""
