"""Numerics are collected where they can be computed; `test_interpreter.py` sees to it elsewhere."""

from tests.kernels.gpu.numerics.device import CAN_COMPUTE

collect_ignore = [] if CAN_COMPUTE else ["numerics"]
