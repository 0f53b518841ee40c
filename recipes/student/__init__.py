"""Train the small cross-encoder: the paper's LRKD students and what they are compared with."""
