"""GGUF: one file that llama.cpp, and what is built on it, runs."""

from moekit.checkpoint.gguf.write import DType, write_gguf

__all__ = ["DType", "write_gguf"]
