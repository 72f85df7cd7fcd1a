"""A recipe becomes ranks. Only worker, shard, finetune and inference import torch."""
