"""Training: the objective, the optimizer, the loop, and what survives a crash."""
