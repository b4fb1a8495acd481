"""What this machine does: its limits, and predicted work run for real."""
