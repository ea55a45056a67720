"""Body and head of many families against the logits that their own class gives."""

import pytest
import torch
import transformers
from families import FAMILIES, family
from tiny_models import SIZES

from distill.body import body_of, full_logits, head_of, is_head_right

# families that do more to their logits than multiply
SCALED = {
    "CohereForCausalLM": {"logit_scale": 0.25, "pad_token_id": 2},
    "GraniteForCausalLM": {"logits_scaling": 4.0},
    "Gemma2ForCausalLM": {"head_dim": 8, "final_logit_softcapping": 3.0, "attn_implementation": "eager"},
    "GPTNeoXForCausalLM": {},
}


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "bert"])
def test_hidden_states_and_head_give_the_logits_of_each_family(name: str) -> None:
    model = family(name)
    assert is_head_right(model)
    ids = torch.arange(3, 15)[None]
    head = head_of(model)
    assert head is not None
    with torch.no_grad():
        hidden = body_of(model, {"input_ids": ids}).last_hidden_state[0]
        torch.testing.assert_close(full_logits(head, hidden), model(input_ids=ids).logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SCALED)
def test_scales_and_soft_caps_are_told_by_the_configuration(name: str) -> None:
    made = getattr(transformers, name)
    torch.manual_seed(0)
    model = made(made.config_class(**SIZES | SCALED[name])).eval()
    head = head_of(model)
    assert head is not None and is_head_right(model)
    if name == "CohereForCausalLM":
        assert head.scale == 0.25
    if name == "GraniteForCausalLM":
        assert head.scale == 0.25
    if name == "Gemma2ForCausalLM":
        assert head.softcap == 3.0


def test_a_head_that_does_more_than_is_known_is_found_out() -> None:
    model = family("llama")
    own = model.forward

    def forward(*args: object, **kwargs: object) -> object:
        output = own(*args, **kwargs)
        output.logits = output.logits + output.logits.square()
        return output

    model.forward = forward
    assert not is_head_right(model)
    del model.forward
    assert is_head_right(model)
    model.lm_head = torch.nn.Sequential(model.lm_head)
    assert head_of(model) is None
