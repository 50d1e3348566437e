"""Counting the matrix products that a function really runs."""

from zoo.testing.flops import counted_flops

__all__ = ["counted_flops"]
