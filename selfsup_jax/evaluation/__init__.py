"""Evaluation of a frozen encoder."""
