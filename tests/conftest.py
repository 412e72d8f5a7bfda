"""What every test process needs."""

import os
import signal

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run as Python on the CPU; read when they are defined

# One thread: tiny policies lose more to waiting for each other than two threads gain.
torch.set_num_threads(1)

# Started in the background of a script, a process and its children ignore SIGINT; tests that send it need it heard.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
