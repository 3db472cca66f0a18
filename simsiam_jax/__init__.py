"""SimSiam: Exploring Simple Siamese Representation Learning, Chen and He 2020 (2011.10566)."""
