"""Integers by their bits: what a GPU does and the interpreter cannot, in torch's bfloat16."""

import torch

from moe_server.kernels.gpu.programs import weights


def test_every_code_less_every_zero_is_exact():
    codes = torch.arange(16, dtype=torch.int16)
    numbers = (codes | weights.HALF_INTEGER_BITS.value).view(torch.bfloat16)
    differences = numbers[:, None] - numbers[None, :]
    assert torch.equal(differences, (codes[:, None] - codes[None, :]).bfloat16())


def test_every_byte_is_a_number():
    codes = torch.arange(256, dtype=torch.int32)
    numbers = (codes | weights.INTEGER_BITS.value).view(torch.float32) - weights.INTEGER_BASE.value
    assert torch.equal(numbers, codes.float())
    assert torch.equal((numbers - 128).bfloat16().float(), codes.float() - 128)
