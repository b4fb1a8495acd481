"""Fast paths for CPUs, each with a plain twin: products of a few rows with matrices that are read once."""
