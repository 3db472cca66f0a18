"""Barlow Twins: redundancy reduction, Zbontar et al. 2021 (arXiv 2103.03230)."""
