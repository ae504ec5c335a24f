"""Two-stage training: the gate alone, then the gate and the specialists."""
