"""Rows in the output's order against the definition, token by token in float64."""

import pytest
import torch

from mergekit_lite.tokens.token_rows import LACKING, Given, aligned, beside, row_map, scratch
from mergekit_lite.tokens.tokenizer import Tokens
from wtool.checkpoint import TensorInfo

OUTPUT = Tokens({"p": 0, "q": 1, "r": 2, "s": 3, "t": 4})  # of 8 rows
MODELS = [
    Tokens({"p": 0, "q": 1, "r": 2}),
    Tokens({"q": 0, "p": 1, "s": 3}),
    Tokens({"p": 0, "s": 1, "r": 4}),
]
COUNTS = [6, 4, 5]
SIZE = 8


def rows_of(model, slot):
    """The definition: a model's own row for a row of the output, or None."""
    token = next((token for token, number in OUTPUT.numbers.items() if number == slot), None)
    if token is None:  # padding, in the models that have it there too
        own = None if slot in MODELS[model].numbers.values() else slot
    else:
        own = MODELS[model].numbers.get(token)
    return own if own is not None and own < COUNTS[model] else None


def defined(tensors, base, given):
    """What each model brings to the merge: base's row, else the mean; else the mean of its other rows."""
    result = []
    for model, tensor in enumerate(tensors):
        rows, middling = [], []
        for slot in range(SIZE):
            own = rows_of(model, slot)
            found = [tensors[i][rows_of(i, slot)] for i in range(3) if rows_of(i, slot) is not None]
            rule = given.get(slot)
            if own is not None and not (rule and rule.force):
                rows.append(tensor[own].double())
            elif rule:
                mine = [tensors[i][row].double() for i, row in rule.rows.items()]
                rows.append(sum(mine) / len(mine) if mine else torch.zeros_like(tensor[0]).double())
            elif base is not None and rows_of(base, slot) is not None:
                rows.append(tensors[base][rows_of(base, slot)].double())
            elif found:
                rows.append(sum(row.double() for row in found) / len(found))
            else:
                rows.append(torch.zeros_like(tensor[0]).double())
                middling.append(slot)
        whole = torch.stack(rows)
        for slot in middling:
            whole[slot] = whole[[i for i in range(SIZE) if i not in middling]].mean(0)
        result.append(whole)
    return result


GIVEN = {
    "nothing": {},
    "zero": {3: Given({})},
    "another's row": {2: Given({1: 2}), 3: Given({0: 5}, force=True)},
    "forced zero": {0: Given({}, force=True), 4: Given({2: 3})},
    "a mean": {1: Given({0: 0, 2: 2}, force=True)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("base", [0, 1, None])
@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("axis", [0, 1])
def test_every_row_is_what_it_is_defined_to_be(dtype, base, given, axis):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(count, 5, generator=generator).to(dtype) for count in COUNTS]
    before = [tensor.clone() for tensor in tensors]
    rows = row_map(SIZE, OUTPUT, MODELS, COUNTS, base, GIVEN[given])
    found = []
    function = aligned(lambda *each: found.extend(each) or each[0], rows, axis, [0, 1, 2], 3)
    function(*(tensor.movedim(0, axis) for tensor in tensors))
    for one, expected in zip(found, defined(tensors, base, GIVEN[given]), strict=True):
        assert one.dtype == dtype
        exact = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float64: 1e-12}[dtype]
        torch.testing.assert_close(one.movedim(axis, 0).double(), expected, rtol=exact, atol=exact)
    assert all(torch.equal(now, then) for now, then in zip(tensors, before, strict=True))


def test_a_bias_has_one_number_a_token():
    rows = row_map(SIZE, OUTPUT, MODELS, COUNTS, 0, {})
    biases = [torch.arange(count, dtype=torch.float32) + 10 * i for i, count in enumerate(COUNTS)]
    out = aligned(lambda first, second, third: torch.stack([first, second, third]), rows, 0, [0, 1, 2], 3)(*biases)
    assert torch.is_tensor(out)
    wide = defined([bias[:, None] for bias in biases], 0, {})
    torch.testing.assert_close(out.double(), torch.stack([each[:, 0] for each in wide]))


def test_what_is_in_order_is_not_copied():
    rows = row_map(3, MODELS[0], [MODELS[0], MODELS[0]], [3, 4], 0, {})
    tensors = [torch.randn(3, 2), torch.randn(4, 2)]
    same = []
    aligned(lambda *each: same.extend(each) or each[0], rows, 0, [0, 1], 2)(*tensors)
    assert same[0].data_ptr() == tensors[0].data_ptr() and torch.equal(same[1], tensors[1][:3])
    info = [TensorInfo("F32", (3, 2)), TensorInfo("F32", (4, 2))]
    assert scratch(rows, info[0], info, [0, 1], 0) == 3 * 2 * 4  # the second alone


def test_models_that_are_read_for_their_rows_alone():
    rows = row_map(SIZE, OUTPUT, MODELS, COUNTS, 0, {})
    assert (rows.rows[0] == LACKING).nonzero().reshape(-1).tolist() == [3, 4, 6, 7]
    assert beside(rows, [0]) == [1, 2]  # token s is in both of the others
    assert beside(rows, [0, 1]) == [2]  # whose row goes into the mean
    assert beside(rows, [1, 2]) == [0]  # the base
    assert beside(rows, [0, 1, 2]) == []
    tensors = [torch.randn(count, 5) for count in COUNTS]
    out = aligned(lambda only: only, rows, 0, [0, 1, 2], 1)(*tensors)
    assert torch.is_tensor(out)
    torch.testing.assert_close(out.double(), defined(tensors, 0, {})[0], rtol=1e-6, atol=1e-6)


def test_models_with_the_same_tokens_need_nobody_beside_them():
    rows = row_map(3, MODELS[0], [MODELS[0]] * 3, [3, 3, 3], 0, {})
    assert beside(rows, [1]) == [] and len(rows.lacked) == 0
