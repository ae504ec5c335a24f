"""The errors of the model package, which imports nothing else of ultrafuser."""


class UltraFuserError(ValueError):
    """Root of every error that ultrafuser raises on purpose."""


class CheckpointError(UltraFuserError):
    """Weights or manifests that are missing, changed since they were recorded, or half written."""
