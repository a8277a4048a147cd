"""The launch plan: a program as kernels in a device's own language, and JSON that says when each is launched, and with what.

For devices that TVM has no runtime for here; a host that runs a plan is small (runtime/hosts/ in Python). docs/targets.md has
the format.
"""
