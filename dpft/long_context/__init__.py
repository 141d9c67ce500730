"""Long texts on one card: blocks in tiles of tokens, checkpoints in host memory, no attention mask ``[T, T]``."""
