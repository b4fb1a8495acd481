"""Reading and writing models: the only place that touches weights on disk."""
