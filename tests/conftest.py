"""One thread a test process: tiny policies lose more to waiting for each other than two threads gain."""

import torch

torch.set_num_threads(1)
