"""Publish: what goes to the Hub, as folders with cards."""
