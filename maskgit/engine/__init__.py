"""The training engine: runs any task, knows none."""
