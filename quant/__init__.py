"""Quantizing checkpoints.

| method | paper                                                                                       | file    |
|--------|---------------------------------------------------------------------------------------------|---------|
| rtn    | none: every weight to the nearest point of its grid                                         | rtn.py  |
| gptq   | Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization …", arXiv 2210.17323        | gptq.py |

What GPTQ is made of: `stack` (matrices laid out for a sweep), `sweep` (the columns, one after the other), `kernels`
(the same on a GPU), `refine` (what can be gained afterwards). The grids themselves are in `wtool.grid`, Gram matrices
and their factors in `wtool.statistics`.
"""
