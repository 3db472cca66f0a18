"""VICReg: Variance-Invariance-Covariance Regularization, Bardes et al. 2021 (arXiv 2105.04906)."""
