"""Shapes and types that break implementations of element-wise methods."""

import torch

SHAPES = [(), (1,), (7,), (5, 1), (1, 5), (13, 17), (3, 4, 5)]
TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
