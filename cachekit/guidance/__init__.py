"""How guidance branches reach a denoiser, and how a call is cut down to one of them."""
