"""The fused model: self-contained, so that its files can travel beside a checkpoint."""
