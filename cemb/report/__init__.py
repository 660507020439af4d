"""From records to the pages of the book. It only reads records."""
