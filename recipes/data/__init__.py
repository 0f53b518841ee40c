"""Pairs: from a Hub dataset or a file (`prepare`), or from the embedded synthetic marketplace (`bazaar`)."""
