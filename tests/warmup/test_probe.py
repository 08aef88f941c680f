import pytest

from moe_server.warmup.probe import ProbeShape


@pytest.mark.parametrize(
    ("prompt", "new", "limit", "expected"),
    [(64, 4, 1000, (64, 4)), (64, 4, 10, (6, 4)), (64, 4, 3, (1, 2)), (64, 4, 2, (1, 1))],
)
def test_fitting(prompt, new, limit, expected):
    shape = ProbeShape.fitting(prompt, new, model="", vocab_size=9, max_request_tokens=limit)
    assert (shape.prompt_tokens, shape.new_tokens) == expected


def test_prompts_differ_by_seed_and_repeat_with_it():
    shape = ProbeShape("", 32_000, prompt_tokens=64, new_tokens=4, max_request_tokens=99)
    prompts = [shape.prompt(seed) for seed in range(50)]
    assert len({tuple(prompt) for prompt in prompts}) == 50
    assert shape.prompt(7) == prompts[7]
    assert all(0 <= token < 32_000 for prompt in prompts for token in prompt)
