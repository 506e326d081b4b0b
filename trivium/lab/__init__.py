"""Floor 8: measured claims, ablations and scaling laws: experiments over recipes."""
