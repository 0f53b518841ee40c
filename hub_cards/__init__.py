"""Cards for the Hub, rendered from facts that runs recorded."""
