"""Training: restarts and phases (`train.py`), the step loop (`trainer.py`), batches, checkpoints, divergence, OOM."""
