"""The merge methods: a pure function in a file each, and `table`, the row that each has there.

Which method is which paper's is told in the docstring of `mergekit_lite`.
"""
