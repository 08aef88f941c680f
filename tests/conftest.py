"""One thread for each test: cores are shared, and small products need no more."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
# Servers that tests start learn nothing from each other, and leave nothing in the user's home.
os.environ["MOE_SERVER_WARMUP__HOT_SET"] = "off"

import torch

torch.set_num_threads(1)
