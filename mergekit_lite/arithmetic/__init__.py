"""What the methods share.

`chunks` is the walk through a tensor in cache-sized pieces; `task_vectors` are differences to a base, trimmed, elected,
summed; `selection` finds the k largest without a sort; `random_mask` has masks that depend on nothing but seed, model,
tensor and element; `gram` has the dot products of the models, and one combination that follows from them; `kernels` are
the compiled loops that all of these go by.
"""
