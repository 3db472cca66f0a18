"""DINO: Emerging Properties in Self-Supervised Vision Transformers, Caron et al. 2021."""
