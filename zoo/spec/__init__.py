"""Specs: what a file says, as typed nodes."""
