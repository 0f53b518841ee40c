"""Serving a student: the handler of an Inference Endpoint, and a server to try it on."""
