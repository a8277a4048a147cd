"""Several operations become one that has a kernel."""
