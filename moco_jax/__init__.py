"""MoCo: Momentum Contrast, He et al. 2019 (arXiv 1911.05722), v2 (2003.04297), v3 (2104.02057)."""
