"""Drift figures by hand, samples, and the refusal."""

import math
from pathlib import Path

import pytest
import torch

from moe_server.checkpoint import read_checkpoint
from moe_server.config import Config
from moe_server.drift import (
    WINDOW_TOKENS,
    Drift,
    measure_drift,
    refuse_drift,
    take_sample,
)
from moe_server.errors import MoeServerError
from moe_server.kernels.formats import WeightFormat
from moe_server.packed import StoreFormat
from moe_server.tokenizer import load_tokenizer
from tests.tiny import Tiny

DEMO = Config().model_path


@pytest.mark.parametrize("positions", [2, 5, 200])
def test_figures_are_averages_over_positions(positions):
    generator = torch.Generator().manual_seed(positions)
    windows = torch.randint(0, 11, (3, positions), generator=generator)
    one = torch.randn(3, positions, 11, generator=generator)
    other = one + 0.5 * torch.randn(3, positions, 11, generator=generator)
    drift = measure_drift(lambda _: one, lambda _: other, windows)
    kl = agreed = loss_one = loss_other = 0.0
    for window in range(3):
        for position in range(positions - 1):
            p = [math.exp(x) for x in one[window, position].double().log_softmax(-1).tolist()]
            q = [math.exp(x) for x in other[window, position].double().log_softmax(-1).tolist()]
            kl += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            agreed += p.index(max(p)) == q.index(max(q))
            following = int(windows[window, position + 1])
            loss_one -= math.log(p[following])
            loss_other -= math.log(q[following])
    count = 3 * (positions - 1)
    assert drift.tokens == count
    assert drift.kl_divergence == pytest.approx(kl / count)
    assert drift.top1_agreement == agreed / count
    assert drift.source_perplexity == pytest.approx(math.exp(loss_one / count))
    assert drift.perplexity == pytest.approx(math.exp(loss_other / count))
    assert drift.perplexity_ratio == pytest.approx(math.exp((loss_other - loss_one) / count))


def test_a_model_does_not_drift_from_itself():
    logits = torch.randn(2, 9, 11).bfloat16()
    windows = torch.randint(0, 11, (2, 9))
    drift = measure_drift(lambda _: logits, lambda _: logits, windows)
    assert (drift.kl_divergence, drift.top1_agreement, drift.perplexity_ratio) == (0, 1, 1)


INT4 = StoreFormat(WeightFormat.BFLOAT16, WeightFormat.INT4, 128)


@pytest.mark.parametrize(
    ("perplexity", "refused"),
    [(9.0, False), (10.49, False), (10.51, True), (math.inf, True), (math.nan, True)],
)
def test_perplexity_may_rise_by_so_much(perplexity, refused):
    drift = Drift(100, 0.1, 0.9, 10.0, perplexity)
    if not refused:
        refuse_drift(drift, 0.05, INT4)
        return
    with pytest.raises(MoeServerError, match=r"more than the 5\.00% allowed") as caught:
        refuse_drift(drift, 0.05, INT4)
    assert caught.value.field == "max_drift"


@pytest.mark.parametrize(
    ("stored", "remedy"),
    [
        (INT4, "--format int8 or a smaller --group-size,"),
        (StoreFormat(WeightFormat.BFLOAT16, WeightFormat.INT4, 32), "--format int8,"),
        (StoreFormat(WeightFormat.BFLOAT16, WeightFormat.INT8, 128), "--format bf16"),
        (
            StoreFormat(WeightFormat.BFLOAT16, WeightFormat.INT8, 128, dense_int8=True),
            "--dense-format checkpoint",
        ),
    ],
)
def test_the_remedy_is_the_next_closer_format(stored, remedy):
    with pytest.raises(MoeServerError) as caught:
        refuse_drift(Drift(100, 0.1, 0.9, 10.0, 20.0), 0.05, stored)
    assert remedy in caught.value.remedy


# What is read


def test_the_built_in_text_is_long_enough_for_whole_windows():
    sample = take_sample(read_checkpoint(DEMO), None, 1024)
    assert sample.windows.shape == (1024 // WINDOW_TOKENS, WINDOW_TOKENS)
    assert sample.description == "the built-in text"
    tokenizer = load_tokenizer(DEMO)
    assert tokenizer is not None
    assert tokenizer.decode(sample.windows.flatten().tolist()).startswith("The harbour wakes")


def test_a_text_of_one_s_own(tmp_path):
    text = tmp_path / "text"
    text.write_text("Return a list of strings. " * 20)
    sample = take_sample(read_checkpoint(DEMO), text, 1024)
    assert sample.windows.shape[0] == 1
    assert 100 < sample.windows.shape[1] < 512
    assert take_sample(read_checkpoint(DEMO), text, 30).windows.shape == (1, 30)


def test_random_tokens_without_a_tokenizer(tmp_path):
    Tiny(vocab=50, max_positions=100).write(tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    sample = take_sample(checkpoint, None, 250)
    assert sample.windows.shape == (2, 100)  # no longer than its context
    assert len(sample.windows.unique()) > 40
    assert sample.windows.max() < 50
    assert torch.equal(sample.windows, take_sample(checkpoint, None, 250).windows)
    assert "no tokenizer" in sample.description


@pytest.mark.parametrize(("content", "problem"), [(b"\xff\xfe", "Cannot read"), (b"", "tokens")])
def test_a_text_that_is_none(tmp_path, content, problem):
    text = tmp_path / "text"
    text.write_bytes(content)
    with pytest.raises(MoeServerError, match=problem):
        take_sample(read_checkpoint(DEMO), text, 100)


def test_a_text_without_a_tokenizer(tmp_path):
    Tiny().write(tmp_path)
    with pytest.raises(MoeServerError, match="no tokenizer"):
        take_sample(read_checkpoint(tmp_path), Path("text"), 100)
