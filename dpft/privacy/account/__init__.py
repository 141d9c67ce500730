"""One account for all that is done with the same records: what it counts, its file, its filter, its statement."""
