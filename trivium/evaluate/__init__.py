"""Floor 5: measuring a model: tasks (perplexity, choices, generate), result files and what differs between two of them."""
