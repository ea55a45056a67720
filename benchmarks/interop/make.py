"""Tiny llamas in every format and grid that a runtime is to open: two layers, hidden size 128, rounded to nearest.

    python benchmarks/interop/make.py FOLDER

config.json has rope_theta at its top level too, where transformers before 5 looks for it, and there is a tokenizer,
without which GPTQModel opens nothing.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from wtool.dtypes import torch_dtype
from wtool.formats import FORMATS, Scheme
from wtool.grid import Grid, Quantized, encode, fit
from wtool.shards import json_bytes

MIXED = "mixed"  # 8 bits for some, 4 for the others, and one layer plain
IN_8_BITS = ("q_proj", "k_proj", "v_proj", "down_proj")
CASES: dict[str, tuple[str, Scheme]] = {
    "gptq-4-64": ("gptq", Scheme(Grid(4, 64))),
    "gptq-4-128": ("gptq", Scheme(Grid(4, 128))),
    "gptq-4-32": ("gptq", Scheme(Grid(4, 32))),
    "gptq-4-row": ("gptq", Scheme(Grid(4, -1))),
    "gptq-4-64-ordered": ("gptq", Scheme(Grid(4, 64), ordered=True)),
    "gptq-8-64": ("gptq", Scheme(Grid(8, 64))),
    "gptq-3-64": ("gptq", Scheme(Grid(3, 64))),
    "gptq-2-64": ("gptq", Scheme(Grid(2, 64))),
    "gptq_v2-4-64-asymmetric": ("gptq_v2", Scheme(Grid(4, 64, symmetric=False))),
    "gptq_v2-3-64-asymmetric": ("gptq_v2", Scheme(Grid(3, 64, symmetric=False))),
    f"gptq-{MIXED}": ("gptq", Scheme(Grid(4, 64))),
    "awq-4-64": ("awq", Scheme(Grid(4, 64, symmetric=False))),
    "awq-4-128": ("awq", Scheme(Grid(4, 128, symmetric=False))),
    "awq-4-64-symmetric": ("awq", Scheme(Grid(4, 64))),
    "compressed-tensors-4-64": ("compressed-tensors", Scheme(Grid(4, 64))),
    "compressed-tensors-3-64-asymmetric": ("compressed-tensors", Scheme(Grid(3, 64, symmetric=False))),
}


def main() -> None:
    folder = Path(sys.argv[1])
    torch.manual_seed(0)
    if not (folder / "model").is_dir():
        config = LlamaConfig(
            vocab_size=512,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            initializer_range=0.1,
        )
        LlamaForCausalLM(config).half().save_pretrained(folder / "model")
    for case, (format, scheme) in CASES.items():
        write(folder / "model", folder / case, format, scheme, case.endswith(MIXED))


def write(model: Path, folder: Path, name: str, usual: Scheme, mixed: bool) -> None:
    """Write the model in a format, all linear layers but the head on one grid unless they are mixed."""
    folder.mkdir(exist_ok=True)
    format, schemes, plain = FORMATS[name], {}, ["lm_head"]
    tensors = load_file(model / "model.safetensors")
    for tensor in [tensor for tensor in tensors if tensor.endswith("_proj.weight")]:
        layer = tensor.removesuffix(".weight")
        scheme = Scheme(Grid(8, 32)) if mixed and layer.endswith(IN_8_BITS) else usual
        if mixed and layer.endswith("layers.1.self_attn.o_proj"):
            plain.append(layer)
            continue
        held = rounded(tensors.pop(tensor).float(), scheme, torch_dtype(format.scale_dtype("F16")))
        tensors |= {f"{layer}.{suffix}": part for suffix, part in format.encode(held, scheme).items()}
        schemes[layer] = scheme
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    words = Tokenizer(WordLevel({"<s>": 0, "</s>": 1, "word": 2}, unk_token="word"))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    config = json.loads((model / "config.json").read_text())
    settings = format.settings(schemes, plain)
    config |= {"rope_theta": config["rope_parameters"]["rope_theta"], "quantization_config": settings}
    for file, content in ({"config.json": config} | format.files(settings)).items():
        (folder / file).write_bytes(json_bytes(content))


def rounded(weight: torch.Tensor, scheme: Scheme, dtype: torch.dtype) -> Quantized:
    """A matrix [out, in] on its grid; ordered groups are of inputs picked at random."""
    inputs = weight.shape[1]
    order = torch.randperm(inputs) if scheme.ordered else torch.arange(inputs)
    scales, zeros = fit(weight[:, order], scheme.grid, dtype=dtype)
    index = scheme.grid.group_index(inputs)[order.argsort()]
    return Quantized(encode(weight, scales, zeros, index, scheme.grid), scales, zeros, index)


if __name__ == "__main__":
    main()
