"""LoRA adapters: several made one without their base (`merge`), and one made of what fine-tuning changed (`extract`).

`files` reads and names adapters, `space` and `svd` are the arithmetic, `survey`, `targets` and `whole` tell which
tensors of a fine-tune become factors, which are kept whole and which did not change; `card` is the model card.
"""
