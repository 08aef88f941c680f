"""Where these tests compute: in Triton's interpreter if it is chosen, else on a GPU."""

import importlib.util
import os

import torch

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
CAN_COMPUTE = HAS_TRITON and (IS_INTERPRETED or torch.cuda.is_available())
DEVICE = torch.device("cpu" if IS_INTERPRETED or not torch.cuda.is_available() else "cuda")
