"""How much of the sum of squares of what each block puts out is the first token's of a window.

    python first_tokens.py MODEL IDS.jsonl

IDS are calibration windows of texts.py, of which eight are read. Layers are counted from 0; the last one's output has
been through the final norm. The length of the longest token is told beside it, in medians.
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM


@torch.inference_mode()
def main() -> None:
    model, ids = sys.argv[1:3]
    with open(ids) as file:
        windows = torch.tensor([json.loads(file.readline())["input_ids"] for _ in range(8)])
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).base_model
    states = network(input_ids=windows, output_hidden_states=True).hidden_states[1:]
    for layer, state in enumerate(states):
        squares = state.float().square().mean(-1)
        share, longest = squares[:, 0].sum() / squares.sum(), (squares.max() / squares.median()).sqrt()
        print(f"layer {layer:2}: the first token's share {float(share):.3f}, the longest {float(longest):.0f} medians")


if __name__ == "__main__":
    main()
