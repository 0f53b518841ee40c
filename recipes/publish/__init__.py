"""From what runs recorded to repositories on the Hub."""
