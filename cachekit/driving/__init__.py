"""Take denoiser calls through the plan: locate them, run the forward or not, finish them."""
