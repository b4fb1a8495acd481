"""Other programs that do the same work; none of them is needed to use moekit."""
