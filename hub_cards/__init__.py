"""Cards of what is published: typed facts in, README.md out. A fact that is missing is an error, never a blank."""
