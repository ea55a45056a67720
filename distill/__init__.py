"""Distilling checkpoints: a student is trained to say what its teacher says.

| loss            | paper                                                                  | file                    |
|-----------------|------------------------------------------------------------------------|-------------------------|
| forward-kl      | Hinton et al. 2015, "Distilling the Knowledge …", arXiv 1503.02531     | losses.py               |
| reverse-kl      | Gu et al. 2023, "MiniLLM", arXiv 2306.08543 (the divergence alone)     | losses.py               |
| jsd             | Agarwal et al. 2023, "On-Policy Distillation …", arXiv 2306.13649      | losses.py               |
| skew-kl, …      | Ko et al. 2024, "DistiLLM", arXiv 2402.03898                           | losses.py               |
| tvd             | Wen et al. 2023, "f-Divergence Minimization …", arXiv 2307.15190       | losses.py               |
| uld             | Boizard et al. 2024, "… Cross-Tokenizer …", arXiv 2402.12030           | losses.py, alignment.py |
| hidden states   | Jiao et al. 2019, arXiv 1909.10351; Sanh et al. 2019, arXiv 1910.01108 | hidden_states.py        |
| relations       | Wang et al. 2020, "MiniLMv2", arXiv 2012.15828                         | relations.py            |
| cached, sampled | Anshumann et al. 2025, "Sparse Logit Sampling", arXiv 2503.16870       | signals.py              |
| on-policy       | Agarwal et al. 2023, as above                                          | on_policy.py            |

The loss is made without the logits of all tokens (`linear_divergence`), inside the student's forward (`objective`,
`body`). A teacher is in memory, streamed, or a cache of what it said (`teacher`, `teacher_cache`, `signal_cache`). The
training is transformers' (`trainer`, `settings`, `optimizers`); what it begins with and what it leaves are ours
(`student`, `data`, `planner`, `making`, `run`, `export`).
"""
