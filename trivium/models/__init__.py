"""Floor 2: models assembled from the parts, and presets (values only)."""
