"""Floor 5: the one loop, its objectives, checkpoints and metrics."""
