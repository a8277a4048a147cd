"""Machines that launch plans: a folder of kernels and JSON that says when each runs. docs/targets.md has the format."""
