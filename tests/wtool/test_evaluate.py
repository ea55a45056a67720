"""Perplexity and divergence against the definitions, token by token in float64; models of any source and family."""

import copy
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import SIZES, TEXT, VOCABULARY, llama, saved, tokenizer
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import wtool.evaluate
from wtool.checkpoint import Checkpoint, open_checkpoint
from wtool.errors import InputError, MalformedFile, Mismatch, MissingInput, UsageError
from wtool.evaluate import Window, encode, evaluate, spread, tokenizers_differ
from wtool.loading import load_model, load_tokenizer, pick_device, quiet, working_dtype
from wtool.shards import json_bytes

SHORT = TEXT[:400]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For models this small, threads are only in each other's way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@torch.no_grad()
def slow_distributions(model: PreTrainedModel, text: str, window: int, stride: int, bos: bool) -> tuple[Tensor, Tensor]:
    """The tokens to score, and the logarithms of the distributions before them, each from a run of its own in float64.

    A token's context is all that lies before it in the first window that reaches it.
    """
    ids = tokenizer(bos)(text, verbose=False)["input_ids"]
    model = model.double()
    found: list[Tensor] = []
    for target in range(1, len(ids)):
        begin = 0
        while begin + window < target:
            begin += stride
        begin = max(0, min(begin, len(ids) - 1 - window))
        context = ids[begin:target]
        context[0] = 0 if bos else context[0]
        found.append(model(torch.tensor([context])).logits[0, -1].log_softmax(-1))
    model.float()
    return torch.tensor(ids[1:]), torch.stack(found)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize(
    "window, stride",
    [(16, 8), (16, 16), (16, 1), (7, 3), (1, 1), (2, 1), (64, 32), (60, 59)],
)
def test_perplexity_is_its_definition(window: int, stride: int, bos: bool) -> None:
    model, text = llama(), SHORT[:110]
    targets, distributions = slow_distributions(model, text, window, stride, bos)
    nats = -distributions.gather(-1, targets[:, None]).mean().item()
    found = evaluate(model, tokenizer(bos), text, window=window, stride=stride)
    assert found.nats_per_token == pytest.approx(nats, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nats), rel=1e-4)
    assert (found.tokens, found.bos) == (len(targets), bos)
    assert (found.window, found.stride, found.nonfinite) == (window, stride, 0)


def test_divergence_is_its_definition() -> None:
    model, reference = llama(0), llama(1)
    text = SHORT[:150]
    _, ours = slow_distributions(model, text, 32, 16, True)
    _, theirs = slow_distributions(reference, text, 32, 16, True)
    divergence = (theirs.exp() * (theirs - ours)).sum(-1).mean().item()
    agreement = (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item()
    found = evaluate(model, tokenizer(), text, window=32, stride=16, reference=reference)
    assert found.divergence == pytest.approx(divergence, rel=1e-5)
    assert found.agreement == agreement
    alone = evaluate(reference, tokenizer(), text, window=32, stride=16)
    assert found.reference_perplexity == pytest.approx(alone.perplexity, rel=1e-9)


@pytest.mark.parametrize("twin", [False, True])
def test_a_model_does_not_diverge_from_itself(twin: bool) -> None:
    model = llama()
    found = evaluate(model, tokenizer(), SHORT, window=32, reference=llama() if twin else model)
    assert (found.divergence, found.agreement) == (0.0, 1.0)
    assert found.reference_perplexity == found.perplexity


def test_batches_and_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, reference = llama(0), llama(1)
    steps: list[int] = []
    whole = evaluate(model, tokenizer(), SHORT, window=16, stride=5, reference=reference, progress=steps.append)
    assert sum(steps) == whole.tokens and len(steps) == whole.windows
    monkeypatch.setattr(wtool.evaluate, "LOGITS", 3 * VOCABULARY)
    for batch in (1, 3, 100):
        found = evaluate(model, tokenizer(), SHORT, window=16, stride=5, reference=reference, batch=batch)
        assert found.nats_per_token == pytest.approx(whole.nats_per_token, rel=1e-6)
        assert found.divergence == pytest.approx(whole.divergence, rel=1e-5)
        assert (found.agreement, found.tokens) == (whole.agreement, whole.tokens)


def test_windows_score_every_token_once_with_its_context() -> None:
    dice = random.Random(0)
    for _ in range(300):
        targets, window = dice.randint(1, 60), dice.randint(1, 30)
        stride = dice.randint(1, window)
        windows = spread(targets, window, stride)
        scored = [token for each in windows for token in range(each.fresh, each.end + 1)]
        assert scored == list(range(1, targets + 1))
        assert {each.end - each.begin for each in windows} == {min(window, targets)}
        for each in windows[1:]:
            assert each.fresh - each.begin >= window - stride + 1  # tokens before the first that is scored
    assert spread(10, 4, 2) == [Window(0, 4, 1), Window(2, 6, 5), Window(4, 8, 7), Window(6, 10, 9)]
    assert spread(9, 4, 4) == [Window(0, 4, 1), Window(4, 8, 5), Window(5, 9, 9)]


def test_short_texts_and_limits() -> None:
    model = llama()
    one = evaluate(model, tokenizer(), "a")
    assert (one.tokens, one.windows, one.window, one.stride) == (1, 1, 64, 32)  # 64 positions
    with pytest.raises(InputError, match="nothing to score: the text has one token"):
        evaluate(model, tokenizer(bos=False), "a")
    with pytest.raises(InputError, match="nothing to score: the text is empty"):
        evaluate(model, tokenizer(bos=False), "")
    with pytest.raises(UsageError, match="a stride of 9 tokens does not fit a window of 8: take 1 to 8"):
        evaluate(model, tokenizer(), SHORT, window=8, stride=9)
    ids, bos = encode(tokenizer(), SHORT)
    assert bos == 0 and ids[0] == 0
    limited = evaluate(model, tokenizer(), SHORT, window=16, limit=20)
    same = evaluate(model, tokenizer(), str(tokenizer().decode(ids[1:21])), window=16)
    assert limited == same and limited.tokens == 20


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    model = llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    found = evaluate(model, tokenizer(), SHORT, reference=model)
    assert found.perplexity == pytest.approx(VOCABULARY, rel=1e-6)


def test_values_that_are_not_finite_are_told() -> None:
    model = llama()
    rare = tokenizer().encode("a", add_special_tokens=False)[0]
    with torch.no_grad():
        model.model.embed_tokens.weight[rare] = math.nan
    found = evaluate(model, tokenizer(), "bcda bcd", window=4)
    assert 0 < found.nonfinite < found.tokens and math.isnan(found.perplexity)
    with torch.no_grad():
        model.model.embed_tokens.weight[rare] = 0.0
        model.lm_head.weight.mul_(1e30)
    assert evaluate(model, tokenizer(), SHORT).perplexity == math.inf


def test_dropout_is_off_and_comes_back() -> None:
    model = llama(attention_dropout=0.5)
    expected = evaluate(model, tokenizer(), SHORT)
    model.train()
    assert evaluate(model, tokenizer(), SHORT) == expected and model.training


def padded(model: PreTrainedModel, rows: int) -> PreTrainedModel:
    """The same model with a vocabulary of more rows, which hold nothing sensible."""
    more = llama(vocab_size=VOCABULARY + rows)
    state = model.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.cat([state[name], torch.full((rows, SIZES["hidden_size"]), 0.3)])
    more.load_state_dict(state)
    return more


def test_rows_that_pad_the_vocabulary_are_left_out_of_the_divergence() -> None:
    model = llama()
    for pair in ((model, padded(model, 64)), (padded(model, 64), model)):
        found = evaluate(pair[0], tokenizer(), SHORT, reference=pair[1])
        assert found.divergence == pytest.approx(0.0, abs=1e-6) and found.agreement == 1.0
        assert found.perplexity != found.reference_perplexity  # each over its own vocabulary


def test_tokens_beyond_the_vocabulary_are_refused() -> None:
    with pytest.raises(Mismatch, match=r"the tokenizer gives token \d+, but the model's vocabulary has 100"):
        evaluate(llama(vocab_size=100), tokenizer(), SHORT)


def test_tokenizers_that_differ_are_told() -> None:
    assert tokenizers_differ(tokenizer(), tokenizer(), SHORT) is None
    assert "other tokens" in (tokenizers_differ(tokenizer(), tokenizer(bos=False), SHORT) or "")
    model = json.loads(tokenizer().backend_tokenizer.to_str())
    vocabulary = model["model"]["vocab"]
    vocabulary["!"], vocabulary["#"] = vocabulary["#"], vocabulary["!"]
    swapped = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(model)), bos_token="<s>")
    assert tokenizers_differ(tokenizer(), swapped, "no such signs") == "2 tokens have other numbers, the first is '!'"
    more = copy.deepcopy(tokenizer())
    more.add_tokens(["<image>"])
    assert tokenizers_differ(tokenizer(), more, SHORT) is None
    assert tokenizers_differ(tokenizer(), more, "an <image>") is not None


FAMILIES: dict[str, Any] = {
    "llama": lambda: llama(),
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)),
    "qwen3-moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8)
    ),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=64, bos_token_id=0, eos_token_id=1
        )
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_any_family_is_what_transformers_loads(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    with quiet():
        model = FAMILIES[family]()
    saved(model.bfloat16(), tmp_path, with_tokenizer=False)
    checkpoint = open_checkpoint(str(tmp_path))
    if family in ("mixtral", "qwen3-moe"):
        assert any(".experts.3." in name for name in checkpoint.tensors)  # as on the Hub: one tensor an expert
    ours = load_model(checkpoint, dtype="F32")
    with quiet():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.tensor([encode(tokenizer(), SHORT)[0][:40]])
    with torch.no_grad():
        logits = theirs(ids).logits
        assert torch.equal(ours(ids).logits, logits)
    loss = theirs(ids, labels=ids).loss.item()
    found = evaluate(ours, tokenizer(), SHORT, limit=39)
    assert found.nats_per_token == pytest.approx(loss, rel=1e-5)  # soft caps and all
    assert ours.dtype == torch.float32 and not ours.training


class Computed(Checkpoint):
    """A source that is no folder: every tensor is made when it is read."""

    def __init__(self, inner: Checkpoint, change: Any):
        self.label, self.config, self.files = "computed", inner.config, {}
        self.tensors = inner.tensors
        self.inner, self.change = inner, change

    def read(self, name: str) -> Tensor:
        return self.change(self.inner.read(name))

    def identity(self) -> list[Any]:
        return []

    def folders(self) -> list[Path]:
        return []


def test_any_source_makes_a_model(tmp_path: Path) -> None:
    model = llama()
    checkpoint = open_checkpoint(str(saved(model, tmp_path)))
    doubled = load_model(Computed(checkpoint, lambda tensor: 2 * tensor), dtype="F32")
    assert all(torch.equal(doubled.state_dict()[name], 2 * tensor) for name, tensor in model.state_dict().items())

    def fail(tensor: Tensor) -> Tensor:
        raise MalformedFile("shard 3: cut short")

    with pytest.raises(MalformedFile, match="^shard 3: cut short$"):
        load_model(Computed(checkpoint, fail), dtype="F32")


def altered(folder: Path, **entries: Any) -> Checkpoint:
    checkpoint = open_checkpoint(str(folder))
    (folder / "config.json").write_bytes(json_bytes({**checkpoint.config, **entries}))
    return open_checkpoint(str(folder))


@pytest.mark.parametrize(
    "entries, error, words",
    [
        ({"num_hidden_layers": 3}, MissingInput, "lacks 9 tensor(s) that config.json asks for (model_type llama), the"),
        ({"vocab_size": 400}, Mismatch, "'lm_head.weight' is [320, 32], but config.json asks for [400, 32]"),
        ({"model_type": "lama"}, InputError, "transformers cannot build the model: "),
        ({"model_type": "t5"}, InputError, "transformers cannot build the model: Unrecognized configuration class"),
        (
            {"model_type": "new", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}},
            UsageError,
            "--trust-remote-code runs it",
        ),
    ],
)
def test_what_makes_no_model_is_one_line(tmp_path: Path, entries: Any, error: type[Exception], words: str) -> None:
    saved(llama(), tmp_path, with_tokenizer=False)
    (tmp_path / "code.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(error) as caught:
        load_model(altered(tmp_path, **entries), dtype="F32")
    text = str(caught.value)
    assert words in text and text.startswith(f"{tmp_path}: ") and "\n" not in text


def test_tensors_without_a_place_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(llama(), tmp_path, with_tokenizer=False)
    load_model(altered(tmp_path, num_hidden_layers=1), dtype="F32")
    assert "9 tensor(s) have no place in a llama model and are left out, the first is 'model.layers.1." in caplog.text


def test_a_folder_without_config_or_tokenizer(tmp_path: Path) -> None:
    saved(llama(), tmp_path, with_tokenizer=False)
    with pytest.raises(MissingInput, match="no tokenizer beside the weights"):
        load_tokenizer(open_checkpoint(str(tmp_path)))
    (tmp_path / "config.json").unlink()
    with pytest.raises(MissingInput, match=r"no config.json beside the weights"):
        load_model(open_checkpoint(str(tmp_path)), dtype="F32")


def test_the_tokenizer_is_the_checkpoints(tmp_path: Path) -> None:
    loaded = load_tokenizer(open_checkpoint(str(saved(llama(), tmp_path))))
    assert encode(loaded, SHORT) == encode(tokenizer(), SHORT)
    assert tokenizers_differ(loaded, tokenizer(), SHORT) is None


def test_types_and_devices(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(saved(llama().bfloat16(), tmp_path)))
    assert (working_dtype(checkpoint, "cpu"), working_dtype(checkpoint, "cuda")) == ("F32", "BF16")
    assert load_model(checkpoint, dtype="BF16").dtype == torch.bfloat16
    assert pick_device("cpu") == "cpu"
    with pytest.raises(UsageError, match="device 'gpu' is not one of"):
        pick_device("gpu")
