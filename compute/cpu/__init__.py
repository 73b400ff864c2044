"""The CPU engine: quantised weights, float32 activations, kernels compiled by numba."""
