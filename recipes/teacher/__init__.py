"""The large language model that reasons: chain-of-thought completions in three perspectives."""
