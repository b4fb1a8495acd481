"""Speed beside the machine's limits and beside other programs that do the same work."""
