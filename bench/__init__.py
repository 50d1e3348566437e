"""Measurements, each one command; results are JSON files in `bench/results` and a table on the screen."""
