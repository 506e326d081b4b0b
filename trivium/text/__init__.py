"""Text and token ids: tokenizers, chat templates, and the one prompt contract that joins them. No torch."""
