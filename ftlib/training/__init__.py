"""Loss, batches, the Trainer and its checkpoints."""
