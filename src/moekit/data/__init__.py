"""Text into tokens: documents, tokenizers, corpora and batches."""
