"""Floor 3: optimizers, learning-rate schedules, and the fp32 masters of parameters that are held in fewer bits."""
