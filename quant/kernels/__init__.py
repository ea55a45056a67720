"""Loops that are too slow as single operations on a GPU, in Triton."""
