"""Floor 7: one short file per job, reading top to bottom."""
