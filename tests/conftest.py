"""One thread for each test: cores are shared, and small products need no more."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)
