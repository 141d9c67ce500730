"""From files and names to records, examples and batches."""
