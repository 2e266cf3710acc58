"""Speed, measured against a stated limit."""
