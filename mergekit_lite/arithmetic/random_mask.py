"""Random masks that depend on nothing but (seed, model, tensor, element).

Each (seed, model, tensor) has a key, each key a stream of random bits addressed by the element's number. So a mask is
the same whatever the order of execution, the number of workers, the other models, or the pieces in which the tensor is
walked.
"""

import hashlib

LEVELS = 1 << 16  # a density is honoured to the nearest multiple of 1 / LEVELS


def mask_key(seed: int, model: int, tensor: str) -> int:
    """128 bits that name a mask.

    model: the model's place in the recipe, from 0
    """
    return int.from_bytes(hashlib.blake2b(f"{seed}/{model}/{tensor}".encode(), digest_size=16).digest(), "little")
