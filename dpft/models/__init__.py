"""Whole models: the wrapped forward, Hugging Face causal LMs, the chunked head, and the check of single rows."""
