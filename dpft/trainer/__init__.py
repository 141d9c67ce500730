"""Hugging Face's Trainer and TRL's, private: arguments -> one step per logical batch -> losses by example."""
