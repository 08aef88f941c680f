"""The look-ahead against routers whose choices the test knows."""

import pytest
import torch

from moe_server.offload.prefetch import LookAhead

HIDDEN, EXPERTS, TOP_K, LAYERS = 64, 8, 2, 4


def make(seed=0, top_k=TOP_K, norm_spread=0.0):
    torch.manual_seed(seed)
    gates = [torch.randn(EXPERTS, HIDDEN) for _ in range(LAYERS)]
    norms = [1 + norm_spread * torch.rand(HIDDEN) for _ in range(LAYERS)]
    return LookAhead(gates, norms, top_k), gates, norms


def pass_through(look_ahead, gates, norms, change, tokens=1, seed=1):
    """One pass: yields (predicted, wanted) for each layer that has a predecessor."""
    torch.manual_seed(seed)
    stream = torch.randn(tokens, HIDDEN)
    predicted = None
    for layer in range(LAYERS):
        x = stream * norms[layer]
        logits = x @ gates[layer].T
        look_ahead.observe(layer, logits)
        if predicted is not None:
            yield predicted, set(logits.topk(TOP_K).indices.flatten().tolist())
        predicted = look_ahead.predict(layer, x)
        stream = stream + change * torch.randn(tokens, HIDDEN)


def count(change, tokens=1, passes=150, **kwargs):
    look_ahead, gates, norms = make(**kwargs)
    right = wrong = wanted_in_all = 0
    for seed in range(passes):
        for predicted, wanted in pass_through(look_ahead, gates, norms, change, tokens, seed):
            if seed < 20:  # it learns how far off it is
                continue
            right += len(wanted & set(predicted))
            wrong += len(set(predicted) - wanted)
            wanted_in_all += len(wanted)
    return right, wrong, wanted_in_all


@pytest.mark.parametrize("norm_spread", [0.0, 3.0])
def test_a_stream_that_does_not_change_is_predicted_in_full(norm_spread):
    right, wrong, wanted = count(0.0, norm_spread=norm_spread)
    assert (right, wrong) == (wanted, 0)


@pytest.mark.parametrize("change", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("tokens", [1, 8])
def test_what_is_named_is_nearly_always_wanted(change, tokens):
    right, wrong, wanted = count(change, tokens)
    assert right / (right + wrong) > 0.9
    assert right > 0.1 * wanted


def test_the_more_the_stream_changes_the_less_is_named():
    named = [sum(count(change)[:2]) for change in (0.02, 0.2, 1.0)]
    assert named == sorted(named, reverse=True)
    assert named[-1] < 0.2 * named[0]


def test_nothing_is_named_before_anything_was_observed():
    look_ahead, *_ = make()
    assert look_ahead.predict(0, torch.randn(1, HIDDEN)) == []


def test_the_last_layer_has_no_successor():
    look_ahead, gates, norms = make()
    for _ in pass_through(look_ahead, gates, norms, 0.0):
        pass
    assert look_ahead.predict(LAYERS - 1, torch.randn(1, HIDDEN)) == []


def test_the_surest_comes_first():
    gate = torch.eye(EXPERTS, HIDDEN)
    look_ahead = LookAhead([gate, gate], [torch.ones(HIDDEN)] * 2, TOP_K)
    x = torch.zeros(1, HIDDEN)
    x[0, :EXPERTS] = torch.tensor([0.0, 5, 0, 9, 0, 0, 0, 0])
    look_ahead.predict(0, x)
    look_ahead.observe(1, x @ gate.T + torch.randn(1, EXPERTS))
    assert look_ahead.predict(0, x) == [3, 1]


def test_where_every_expert_is_used_every_expert_is_named():
    look_ahead, *_ = make(top_k=EXPERTS)
    assert sorted(look_ahead.predict(0, torch.randn(1, HIDDEN))) == list(range(EXPERTS))
