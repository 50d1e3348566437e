"""The package beside this file is somebody else's: `test_plugin.py` runs its tests in another process."""

collect_ignore = ["package"]
