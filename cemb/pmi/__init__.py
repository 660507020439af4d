"""Text or events to a PMI matrix: readers, corpora, tokens, counts, the matrix."""
