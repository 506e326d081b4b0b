"""Floor 3: passes over finished models. Nothing here declares a model again."""
