"""Merges that are judged by the loss on held-out text: greedy soups, and the loss on the line between two models.

`held_out` measures; `greedy` is the search, `soup` its place on checkpoints, `ledger` what it has measured so far;
`barrier` is the arithmetic of a line of losses, `barrier_walk` measures along it, `barrier_plot` draws it.
"""
