"""What the fork server imports once, so that each rank starts in a fraction of a second."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import peft  # noqa: F401
import torch  # noqa: F401
import transformers  # noqa: F401

import launch.finetune.loop
import launch.inference.batch  # noqa: F401
