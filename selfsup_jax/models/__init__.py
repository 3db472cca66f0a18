"""Encoders and heads (flax.linen)."""
