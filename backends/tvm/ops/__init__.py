"""Lowerings for every target, one table per family of operations."""
