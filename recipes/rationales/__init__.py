"""From completions to the frozen sentence embeddings that guide the student."""
