"""Floor 4: from logits to tokens, and from tokens to text: sampling, and the batched, cached, streaming `generate`."""
