"""The surfaces people touch: start, ctl, configuration, the supervision tree of a node."""
