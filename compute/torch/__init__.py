"""The torch engine: every family as torch operations, for CUDA and for what no kernel here runs."""
