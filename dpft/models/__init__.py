"""What is specific to Hugging Face models: the wrapped forward, per-example losses, and the chunked LM head."""
