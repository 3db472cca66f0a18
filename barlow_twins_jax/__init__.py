"""Barlow Twins: Self-Supervised Learning via Redundancy Reduction, Zbontar et al. 2021

arXiv 2103.03230.
"""
