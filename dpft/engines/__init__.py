"""Several processes: what each training engine (DDP, FSDP2, DeepSpeed ZeRO) needs around the clipped sums."""
