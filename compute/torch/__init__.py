"""The torch engine: the same decoder as torch operations, for CUDA devices."""
