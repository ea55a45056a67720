"""The models that merges are measured on: a base and two fine-tunes, random numbers in the shapes of llamas."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

MODELS = ("base", "a", "b")
PER_LAYER = 9  # tensors


@dataclass(frozen=True)
class Shape:
    """A llama, and in how many files its weights lie."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False
    shards: int = 1

    @cached_property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes."""
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        keys = self.hidden // self.heads * self.kv_heads
        for layer in range(self.layers):
            block = f"model.layers.{layer}"
            found |= {
                f"{block}.self_attn.q_proj.weight": (self.hidden, self.hidden),
                f"{block}.self_attn.k_proj.weight": (keys, self.hidden),
                f"{block}.self_attn.v_proj.weight": (keys, self.hidden),
                f"{block}.self_attn.o_proj.weight": (self.hidden, self.hidden),
                f"{block}.mlp.gate_proj.weight": (self.ffn, self.hidden),
                f"{block}.mlp.up_proj.weight": (self.ffn, self.hidden),
                f"{block}.mlp.down_proj.weight": (self.hidden, self.ffn),
                f"{block}.input_layernorm.weight": (self.hidden,),
                f"{block}.post_attention_layernorm.weight": (self.hidden,),
            }
        found["model.norm.weight"] = (self.hidden,)
        return found if self.tied else found | {"lm_head.weight": (self.vocabulary, self.hidden)}

    @property
    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "rms_norm_eps": 1e-5,
            "torch_dtype": "bfloat16",
        }


def many(tensors: int) -> Shape:
    """About so many tensors, tiny ones."""
    return Shape(hidden=16, ffn=32, layers=tensors // PER_LAYER, heads=2, kv_heads=1, vocabulary=64, shards=4)


SHAPES: dict[str, Shape] = {
    "1b": Shape(hidden=2048, ffn=5632, layers=22, heads=32, kv_heads=4, vocabulary=32000, shards=4),
    "embedding": Shape(hidden=4096, ffn=256, layers=1, heads=32, kv_heads=8, vocabulary=128256, tied=True),
    **{f"many-{count}": many(count) for count in (1_800, 7_200, 20_000)},
}


def make(shape: Shape, folder: Path) -> None:
    """Write the three checkpoints in bfloat16, each unless it is there."""
    names = list(shape.tensors)
    parts = [names[i * len(names) // shape.shards : (i + 1) * len(names) // shape.shards] for i in range(shape.shards)]
    for model in MODELS:
        if not (folder / model / "config.json").exists():
            _write(shape, folder / model, parts, model)


def _write(shape: Shape, folder: Path, parts: list[list[str]], model: str) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    for i, names in enumerate(parts, 1):
        filename = f"model-{i:05}-of-{len(parts):05}.safetensors" if len(parts) > 1 else "model.safetensors"
        tensors = {name: _weights(name, shape.tensors[name], model) for name in names}
        save_file(tensors, folder / filename, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, filename)
    if len(parts) > 1:
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(shape.config))


def _weights(name: str, shape: tuple[int, ...], model: str) -> "torch.Tensor":
    """The base's numbers, and around them those of a fine-tune."""
    import torch

    base = torch.randn(shape, generator=torch.Generator().manual_seed(len(name) + sum(map(ord, name)))) * 0.02
    if model != "base":
        seed = 1000 + sum(map(ord, name)) + MODELS.index(model)
        base += torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.001
    return base.bfloat16()
