"""Settings that must stand before torch is first imported."""

import os
import signal

# One thread: ranks share two cores, and sums must be taken in one order for two ranks and one process to be compared to the bit.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A shell starts what runs in the background deaf to Ctrl-C, and programs inherit that: the tests' own must hear it.
signal.signal(signal.SIGINT, signal.default_int_handler)
