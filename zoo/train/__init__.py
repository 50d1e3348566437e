"""Training: settings and schedules, data sets that are there on every machine, and a loop that resumes exactly.

Importing this package imports neither torch nor Lightning; `zoo.train.loop.fit` does.
"""
