"""Floor 2: rows from files, their formats, the token bank, packing, and batches that are pure functions of an index."""
