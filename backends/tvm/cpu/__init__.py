"""Kernels for CPUs, and what chooses them."""
