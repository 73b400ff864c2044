"""The MLX engine: the same decoder as MLX operations, for Apple silicon (and any CPU, slowly)."""
