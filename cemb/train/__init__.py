"""Training a pair model on a PMI matrix, and judging the result."""
