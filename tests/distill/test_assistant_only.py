"""Learning what the assistant says alone, and not asking a teacher who is not heard."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from distilled import logits, manifest
from tiny_models import llama, saved, tokenizer

from distill.data import spoken_mask
from distill.planner import plan_distillation
from distill.recipe import parse_recipe
from distill.teacher import OnlineTeacher
from wtool.calibration_data.rows import Chat
from wtool.calibration_data.tokens import of_chat, spoken
from wtool.cli import run
from wtool.errors import InputError, UsageError

Distill = Callable[..., Path]

PLAIN = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MARKED = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>"
    "{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}\n{% endfor %}"
)
FORGETS = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content if loop.last else 'gone' }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def chat(number: int = 3) -> Chat:
    turns = [{"role": "user", "content": f"what is {number}?"}, {"role": "assistant", "content": f"a number, {number}"}]
    more = [{"role": "user", "content": "and?"}, {"role": "assistant", "content": "no more"}]
    return Chat("row 1", [*turns, *more])


@pytest.fixture
def template():
    ours = tokenizer(True)  # the very one that `saved` puts beside a model

    def put(text: str):
        ours.chat_template = text
        return ours

    yield put
    ours.chat_template = None


@pytest.mark.parametrize("text", [PLAIN, MARKED], ids=["rendered again", "marked"])
def test_what_the_assistant_says_is_told(template, text: str) -> None:
    ours = template(text)
    found = spoken(ours, chat())
    assert [token for token, _ in found] == of_chat(ours, chat())
    said = ours.decode([token for token, said in found if said])
    assert said == "a number, 3</s>no more</s>"


def test_a_template_that_forgets_is_refused(template) -> None:
    with pytest.raises(InputError, match="row 1: the chat template renders message 2 otherwise than when it is the l"):
        spoken(template(FORGETS), chat())


def test_a_label_is_the_token_after() -> None:
    said = [torch.tensor([False, True, False]), torch.tensor([True, False, False, True])]
    expected = [[True, False, False, False, False], [False, False, True, False, False]]
    assert spoken_mask(said, [0, 1], 5).tolist() == expected


@pytest.fixture
def chatting(tmp_path: Path, template) -> tuple[Path, Path]:
    """A model whose tokenizer has a chat template, and conversations."""
    template(PLAIN)
    model = saved(llama(num_hidden_layers=3, initializer_range=0.1), tmp_path / "chatting")
    rows = tmp_path / "chats.jsonl"
    rows.write_text("".join(json.dumps({"messages": chat(number).messages}) + "\n" for number in range(40)))
    return model, rows


def test_held_out_loss_is_of_what_the_assistant_says(chatting: tuple[Path, Path], tmp_path: Path) -> None:
    model, rows = chatting
    out = tmp_path / "out"
    flags = ["--data", str(rows), "--seqlen", "60", "--samples", "12", "--held-out", "2", "--steps", "2", "--quiet"]
    assert run(["distill", str(model), "--student-layers", "2", "--assistant-only", *flags, "-o", str(out)]) == 0
    data = {"sources": [str(rows)], "seqlen": 60, "samples": 12, "held_out": 2, "assistant_only": True}
    recipe = {"teacher": str(model), "student_layers": 2, "data": data, "training": {"steps": 2}}
    texts = plan_distillation(parse_recipe(recipe, "test"), device="cpu").texts
    assert texts.spoken is not None
    total, count = 0.0, 0
    for number in texts.held_out:
        window, said = texts.windows[number], texts.spoken[number]
        logs = logits(out, window[None])[0].log_softmax(-1)
        for place in range(len(window) - 1):
            if said[place + 1]:
                total -= float(logs[place, window[place + 1]])
                count += 1
    told = manifest(out)
    kept = next(entry for entry in told["evaluation"] if entry["step"] == told["best_step"])
    assert 0 < count < sum(len(texts.windows[number]) - 1 for number in texts.held_out)
    assert kept["ce"] == pytest.approx(total / count, rel=1e-4)


def test_plain_text_has_no_assistant(
    teacher: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data", str(text), "--seqlen", "32", "--steps", "2", "--assistant-only", "--quiet"]
    assert run(["distill", str(teacher), "--student-layers", "2", *flags, "-o", str(tmp_path / "out")]) != 0
    assert "a text in each row, where what the assistant says is asked for" in capsys.readouterr().err


def test_a_teacher_of_no_weight_is_asked_for_held_out_text_alone(
    distill: Distill, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    say = OnlineTeacher.say

    def counted(self: OnlineTeacher, inputs, learnt, **options):
        asked.append(len(inputs["input_ids"]))
        return say(self, inputs, learnt, **options)

    monkeypatch.setattr(OnlineTeacher, "say", counted)
    told = manifest(distill("--kd", "0", "--ce", "1", "--steps", "5", "--evaluate-every", "5"))
    assert sum(asked) == 2 * 4  # the 4 held-out windows, before and after
    assert "kd" not in told["training"][0] and told["training"][0]["ce"] == pytest.approx(told["training"][0]["loss"])


@pytest.mark.parametrize("other", [{"training": {"on_policy": 0.5}}, {"loss": {"kind": "uld"}}], ids=str)
def test_two_that_say_what_is_learnt(other: dict) -> None:
    with pytest.raises(UsageError, match="assistant_only and .* both say which tokens are learnt; leave one out"):
        parse_recipe({"teacher": "t", "student_layers": 2, "data": {"assistant_only": True}, **other}, "test")
