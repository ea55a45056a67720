"""Quantizing checkpoints.

| method | paper                                                                                       | file    |
|--------|---------------------------------------------------------------------------------------------|---------|
| rtn    | none: every weight to the nearest point of its grid                                         | rtn.py  |
| gptq   | Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization …", arXiv 2210.17323        | gptq.py |
| gptaq  | Li et al. 2025, "GPTAQ: Efficient Finetuning-Free Quantization …", arXiv 2504.02692     | gptq.py |
| awq    | Lin et al. 2023, "AWQ: Activation-aware Weight Quantization …", arXiv 2306.00978            | awq.py  |
| fp8    | Micikevicius et al. 2022, "FP8 Formats for Deep Learning", arXiv 2209.05433 (`--scheme`)    | fp8.py  |
| signround | Cheng et al. 2023, "Optimize Weight Rounding …", arXiv 2309.05516 | signround.py |

What GPTQ is made of: `stack` (matrices laid out for a sweep), `sweep` (the columns, one after the other), `kernels`
(the same on a GPU), `refine` (what can be gained afterwards). What AWQ needs of a model: `feeds` (which operation feeds
which matrices), `chains` (where a scale goes, by names), `fold` (into tensors), `scaled` (on the walk). The grids
themselves are in `wtool.grid`, Gram matrices and their factors in `wtool.statistics`.
"""
