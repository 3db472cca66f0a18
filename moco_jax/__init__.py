"""MoCo: Momentum Contrast, He et al. 2019 (arXiv 1911.05722), and v2 (arXiv 2003.04297)."""
