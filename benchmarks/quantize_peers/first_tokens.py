"""What the first token of a window is to a block: to the squares of what it puts out, and among what its linears take.

    python first_tokens.py MODEL IDS.jsonl

IDS are calibration windows of texts.py, of which eight are read. Layers are counted from 0; the last one's output has
been through the final norm. Told of outputs: the first token's share of the sum of squares, and the length of the
longest in medians. Of inputs (of q_proj, o_proj, up_proj and down_proj): the first token's mean square in medians.
"""

import json
import sys
from collections import defaultdict

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

SITES = ("q_proj", "o_proj", "up_proj", "down_proj")


@torch.inference_mode()
def main() -> None:
    model, ids = sys.argv[1:3]
    with open(ids) as file:
        windows = torch.tensor([json.loads(file.readline())["input_ids"] for _ in range(8)])
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).base_model
    taken: defaultdict[str, list[Tensor]] = defaultdict(list)  # by site, in the order of layers
    for name, module in network.named_modules():
        site = name.rpartition(".")[2]
        if site in SITES:
            module.register_forward_pre_hook(lambda module, given, site=site: taken[site].append(_squares(given[0])))
    states = network(input_ids=windows, output_hidden_states=True).hidden_states[1:]
    for layer, state in enumerate(states):
        squares = _squares(state)
        share, longest = squares[:, 0].sum() / squares.sum(), (squares.max() / squares.median()).sqrt()
        inputs = {site: float(taken[site][layer][:, 0].mean() / taken[site][layer].median()) for site in SITES}
        print(
            f"layer {layer:2}: the first token's share {float(share):.3f}, the longest {float(longest):.0f} medians; ",
            end="",
        )
        print("inputs " + ", ".join(f"{site} {ratio:.4f}" for site, ratio in inputs.items()))


def _squares(activations: Tensor) -> Tensor:
    return activations.float().square().mean(-1)


if __name__ == "__main__":
    main()
