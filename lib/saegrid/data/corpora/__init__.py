"""Corpora: files, Hub datasets and embedded texts, each read as a stream of documents."""
