"""Training: the masked-diffusion loss."""
