"""The one rule by which results in floating point are compared: `zoo.testing.tolerance`."""

from zoo.testing.tolerance import FORWARD_SLACK, GRADIENT_SLACK, ROUNDINGS, assert_close, error

__all__ = ["FORWARD_SLACK", "GRADIENT_SLACK", "ROUNDINGS", "assert_close", "error"]
