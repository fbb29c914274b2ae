"""One run, from a configuration to its checkpoints: trainer, what watches the steps, what survives an interruption."""
