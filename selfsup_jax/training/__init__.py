"""Pretraining: the loop, what is measured on the way, several recipes in one table."""
