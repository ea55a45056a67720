"""Merging checkpoints.

The files are in `methods`:

| method           | paper                                                              | file               |
|------------------|--------------------------------------------------------------------|--------------------|
| linear           | Wortsman et al. 2022, "Model soups", arXiv 2203.05482              | linear.py          |
| slerp            | Shoemake 1985, "Animating rotation with quaternion curves"         | slerp.py           |
| nuslerp          | the same, of tensors, rows or columns, or of task vectors          | nuslerp.py         |
| multislerp       | Goddard, goddard.blog, "Multi-SLERP"                               | multislerp.py      |
| karcher          | Karcher 1977, "Riemannian center of mass …"; Buss and Fillmore 2001 | karcher.py         |
| model_stock      | Jang et al. 2024, "Model Stock", arXiv 2403.19522                  | model_stock.py     |
| nearswap         | QuartetAnemoi-70B-t0.0001, 2024                                    | nearswap.py        |
| arcee_fusion     | Arcee AI, mergekit 0.1, 2025                                       | arcee_fusion.py    |
| task_arithmetic  | Ilharco et al. 2023, "Editing models …", arXiv 2212.04089          | task_arithmetic.py |
| ties             | Yadav et al. 2023, "TIES-Merging", arXiv 2306.01708                | ties.py            |
| dare_linear      | Yu et al. 2024, "Language models are Super Mario", arXiv 2311.03099 | dare.py            |
| dare_ties        | the same, with the sign election of TIES                           | dare.py            |
| breadcrumbs      | Davari and Belilovsky 2024, "Model breadcrumbs", arXiv 2312.06795  | breadcrumbs.py     |
| breadcrumbs_ties | the same, with the sign election of TIES                           | breadcrumbs.py     |
| della            | Deep et al. 2024, "DELLA-Merging", arXiv 2406.11617                | della.py           |
| della_linear     | the same, without sign election                                    | della.py           |
| sce              | Wan et al. 2024, "FuseChat", arXiv 2408.07990                      | sce.py             |
| ram              | Yuan et al. 2026, "Behavior knowledge merge …", arXiv 2601.13572   | ram.py             |
| ramplus_tl       | the same, with what is unique to a model scaled up                 | ram.py             |
| passthrough      |                                                                    | passthrough.py     |

Beside the methods:

    arithmetic  what they share: cache-sized pieces, task vectors, selection, random masks, dot products
    lora        adapters combined without their base, or made of what fine-tuning changed
    tokens      which tokens the output has, where the models' differ, and its chat template
    soups       merges judged by held-out text: greedy soups, and the loss between two models
    regmean     RegMean and RegMean++ on checkpoints, with the walk through the layers

The rest is about names: `recipe` (mergekit's YAML: what was asked) and `places` (where it names models), `parameters`
(gradients and filters), `roles` (base and models), `towers` (text, vision, …), `slices` (stacked layers), `wanted`
(which tensors the output has), `steps` (what makes each), `output_config`, `planner` (recipe to plan), `stages`
(several merges in one file), `disagreement` (what the report tells of a merge).
"""
