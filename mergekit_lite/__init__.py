"""Merging checkpoints.

| method           | paper                                                              | file               |
|------------------|--------------------------------------------------------------------|--------------------|
| linear           | Wortsman et al. 2022, "Model soups", arXiv 2203.05482              | linear.py          |
| slerp            | Shoemake 1985, "Animating rotation with quaternion curves"         | slerp.py           |
| task_arithmetic  | Ilharco et al. 2023, "Editing models …", arXiv 2212.04089          | task_arithmetic.py |
| ties             | Yadav et al. 2023, "TIES-Merging", arXiv 2306.01708                | ties.py            |
| dare_linear      | Yu et al. 2024, "Language models are Super Mario", arXiv 2311.03099 | dare.py            |
| dare_ties        | the same, with the sign election of TIES                           | dare.py            |
| passthrough      |                                                                    | passthrough.py     |

What methods share: `chunks` (the walk through a tensor in cache-sized pieces), `task_vectors` (differences to a
base, trimmed, elected, summed), `selection` (the k largest without a sort), `random_mask` (masks that depend on
nothing but seed, model, tensor and element).

The rest is about names: `recipe` (what was asked), `methods` (their table), `parameters` (gradients and filters),
`config` (mergekit's YAML), `planner` (recipe to plan), `tokenizer` (do the vocabularies agree),
`disagreement` (what the report tells of a merge).
"""
