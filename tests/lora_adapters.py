"""LoRA adapters for tests, trained nowhere: PEFT's, with random factors."""

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

Change = Callable[[Any], None]


@contextmanager
def peft_quiet() -> Iterator[None]:
    """PEFT warns of tied weights, and of its own deprecations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def adapter(base: Path, folder: Path, *, seed: int = 1, **settings: Any) -> Path:
    """Save an adapter with random numbers wherever it would train."""
    torch.manual_seed(seed)
    with peft_quiet():
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings))
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder)
    return folder


def in_peft(base: Path, folder: Path) -> Any:
    """Base and adapter as PEFT loads them; every tensor must find its place."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", "Found missing adapter keys")
        model = AutoModelForCausalLM.from_pretrained(base)
        loaded = PeftModel.from_pretrained(model, str(folder)).eval()
    held = load_file(folder / "adapter_model.safetensors")
    state = {name.replace(".default", ""): tensor for name, tensor in loaded.state_dict().items()}
    for name, tensor in held.items():
        inside = name if name in state else name.rpartition(".")[0] + ".modules_to_save." + name.rpartition(".")[2]
        assert torch.equal(state[inside].to(tensor.dtype), tensor), name
    return loaded


def deltas(model: Any) -> dict[str, Tensor]:
    """What PEFT adds to each weight, in float64, by module."""
    from peft.tuners.lora import LoraLayer

    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            double = module.double()
            found[name.removeprefix("base_model.model.")] = double.get_delta_weight("default").detach().clone()
    return found


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(40)[None]).logits


def settings(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())
