"""Chat templates: each format's text as its description writes it, and which template a merge has."""

import json
from types import SimpleNamespace

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import AutoTokenizer
from vocabulary_models import bpe, saved

from mergekit_lite.recipe import parse_recipe
from mergekit_lite.tokens.chat_template import FORMATS, chosen_template, template_of, template_remarks, with_template
from wtool.cli import run
from wtool.errors import UsageError

ALONE = [("user", "U1")]
WHOLE = [("system", "S"), ("user", "U1"), ("assistant", "A1"), ("user", "U2")]
PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)

# format -> (texts of ALONE and of WHOLE, what asks for an answer)
EXPECTED = {
    "chatml": (
        "<|im_start|>user\nU1<|im_end|>\n",
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
        "<|im_start|>user\nU2<|im_end|>\n",
        "<|im_start|>assistant\n",
    ),
    "llama3": (
        "<s><|start_header_id|>user<|end_header_id|>\n\nU1<|eot_id|>",
        "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nU1<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA1<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nU2<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "alpaca": (
        f"{PREAMBLE}### Instruction:\nU1\n\n",
        "S\n\n### Instruction:\nU1\n\n### Response:\nA1</s>\n\n### Instruction:\nU2\n\n",
        "### Response:\n",
    ),
    "mistral": (
        "<s> [INST] U1 [/INST]",
        "<s> [INST] S\n\nU1 [/INST] A1</s> [INST] U2 [/INST]",
        "",
    ),
    "exaone": (
        "[|system|][|endofturn|]\n[|user|]U1\n",
        "[|system|]S[|endofturn|]\n[|user|]U1\n[|assistant|]A1[|endofturn|]\n[|user|]U2\n",
        "[|assistant|]",
    ),
}


def turns(pairs):
    return [{"role": role, "content": content} for role, content in pairs]


def fail(message):
    raise ValueError(message)


def rendered(template, messages, **more):
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = fail
    return environment.from_string(template).render(messages=messages, **more)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("asks", [False, True])
def test_each_format_is_as_its_description_writes_it(name, asks):
    alone, whole, prompt = EXPECTED[name]
    for pairs, text in ((ALONE, alone), (WHOLE, whole)):
        found = rendered(FORMATS[name], turns(pairs), bos_token="<s>", eos_token="</s>", add_generation_prompt=asks)
        assert found == text + (prompt if asks else "")


@pytest.mark.parametrize("name", FORMATS)
def test_a_tokenizer_without_these_tokens_has_a_text_without_them(name):
    found = rendered(FORMATS[name], turns(WHOLE))
    assert found == EXPECTED[name][1].replace("</s>", "").removeprefix("<s>")


@pytest.mark.parametrize("name", ["alpaca", "mistral"])
def test_a_role_that_a_format_has_not_is_refused(name):
    with pytest.raises(ValueError, match="not tool"):
        rendered(FORMATS[name], turns([("user", "U"), ("tool", "T")]))


@pytest.fixture
def models(tmp_path):
    """Models by their chat templates; None has none."""

    def make(*templates, where="jinja"):
        found = []
        for number, template in enumerate(templates):
            folder = tmp_path / f"{where}{number}"
            folder.mkdir()
            content = {"model_max_length": 5}
            if template is not None and where == "config":
                content["chat_template"] = template
            elif template is not None:
                (folder / "chat_template.jinja").write_text(template)
            (folder / "tokenizer_config.json").write_text(json.dumps(content))
            found.append(SimpleNamespace(files={path.name: path for path in folder.iterdir()}))
        return found

    return make


@pytest.mark.parametrize(
    ("templates", "chosen"),
    [
        (["X", "Y", "Y"], "Y"),
        (["X", "X", "Y"], "X"),
        (["X", "Y"], "X"),
        (["X", "Y", "Y", "X"], "X"),
        ([None, "Y"], "Y"),
        ([None, None, "Y", "X", "X"], "X"),
        ([None], None),
    ],
)
@pytest.mark.parametrize("where", ["jinja", "config"])
def test_auto_is_the_most_frequent_and_of_equals_the_first(models, templates, chosen, where):
    assert chosen_template("auto", models(*templates, where=where)) == chosen


def test_of_several_named_templates_the_default_counts(models):
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    (model,) = models(named, where="config")
    assert template_of(model.files) == "D"


def test_what_transformers_and_others_read_is_the_same(tmp_path):
    bpe().save_pretrained(tmp_path)
    (tmp_path / "chat_template.json").write_text('{"chat_template": "old"}')
    files = with_template({path.name: path for path in tmp_path.iterdir()}, FORMATS["chatml"])
    assert "chat_template.json" not in files
    out = tmp_path / "out"
    out.mkdir()
    for name, content in files.items():
        (out / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    assert json.loads((out / "tokenizer_config.json").read_text())["chat_template"] == FORMATS["chatml"]
    for drop in (None, "chat_template.jinja"):  # from either file
        if drop:
            (out / drop).unlink()
        tokenizer = AutoTokenizer.from_pretrained(out)
        assert tokenizer.apply_chat_template(turns(WHOLE), tokenize=False) == EXPECTED["chatml"][1]
    assert template_of({"tokenizer_config.json": out / "tokenizer_config.json"}) == FORMATS["chatml"]


def test_a_merge_has_the_template_asked_for(tmp_path, capsys):
    marks = [("<|im_start|>", True), ("<|im_end|>", True)]
    first = saved(tmp_path / "first", 1, bpe())
    second = saved(tmp_path / "second", 2, bpe(added=marks))
    (first / "chat_template.jinja").write_text("{{ 'first' }}")
    for asked, text in (("chatml", EXPECTED["chatml"][0]), ("auto", "first"), ("{{ 'own' }}", "own")):
        out = tmp_path / asked[:2]
        command = ["merge", str(first), str(second), "--tokenizer", "union", "--chat-template", asked]
        assert run([*command, "-o", str(out)]) == 0
        assert "is made of" not in capsys.readouterr().err
        tokenizer = AutoTokenizer.from_pretrained(out)
        assert tokenizer.apply_chat_template(turns(ALONE), tokenize=False) == text
    ids = AutoTokenizer.from_pretrained(tmp_path / "ch").apply_chat_template(turns(ALONE), return_dict=False)
    assert ids[0] == 270  # the mark is a token
    command = ["merge", str(first), str(first), "--chat-template", "llama3", "-o", str(tmp_path / "without")]
    assert run(command) == 0
    assert "llama3 is made of <|start_header_id|>, <|end_header_id|>, <|eot_id|>" in capsys.readouterr().err


def test_remarks():
    assert template_remarks("auto", None, None) == ["chat_template: auto, but no model has a chat template"]
    assert template_remarks("chatml", "x", {"<|im_start|>", "<|im_end|>"}) == []
    assert template_remarks("chatml", "x", None) == []  # what is not known is not told


def test_a_misspelt_format_is_named():
    recipe = {"merge_method": "linear", "models": [{"model": "a"}], "chat_template": "chatlm"}
    with pytest.raises(UsageError, match="did you mean 'chatml'"):
        parse_recipe(recipe, "here")
