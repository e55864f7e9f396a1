"""Take denoiser calls through the plan: locate each, run its forward or leave it out, finish it."""
