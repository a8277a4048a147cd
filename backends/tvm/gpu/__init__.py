"""Kernels for GPUs of every kind, their weights and their selection: what differs from device to device is data."""
