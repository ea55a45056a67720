"""Pruning checkpoints.

Structure: the result is a smaller model of the same family, which plain transformers loads.

| what            | paper                                                                            | file          |
|-----------------|----------------------------------------------------------------------------------|---------------|
| layers          | Men et al. 2024 (ShortGPT), Gromov et al. 2024, Kim et al. 2024 (Shortened LLaMA) | depth.py      |
| channels, heads | Muralidharan et al. 2024 (Minitron): by activations                              | width.py      |
| experts         | Lasby et al. 2025, "REAP the Experts", arXiv 2510.13999                          | experts.py    |
| what is left    | least squares, as Kurtic et al. 2023 (ZipLM), arXiv 2302.04089                   | compensate.py |

Matrices: the result has zeros, or factors in the place of matrices.

| method          | paper                                                                            | file          |
|-----------------|----------------------------------------------------------------------------------|---------------|
| magnitude       | Han et al. 2015, arXiv 1506.02626                                                | magnitude.py  |
| wanda           | Sun et al. 2023, "A Simple and Effective Pruning Approach …", arXiv 2306.11695   | wanda.py      |
| ria             | Zhang et al. 2024, "Plug-and-Play: An Efficient Post-training Pruning Method …"  | ria.py        |
| sparsegpt       | Frantar and Alistarh 2023, "SparseGPT", arXiv 2301.00774                         | sparsegpt.py  |
| svd, svd-llm    | Wang et al. 2024, "SVD-LLM", arXiv 2403.07378                                    | lowrank.py    |

`families` and `structure` tell what every axis of a family's tensors counts, `cut` slices them, `choice` decides what
stays, `search` finds sizes for a budget, `structural` makes and runs such plans; `layers`, `planner` and `run` do so
for matrices, `amounts` finds how much each can lose (`owl`). `job` and `stages` are what the command line does.
"""
