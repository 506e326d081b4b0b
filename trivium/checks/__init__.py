"""Floor 4: what is right, and how sure: answers taken from text, text metrics, bootstrap intervals. Pure functions, no torch."""
