"""Sentences, figures and pages from numbers, and the website and model repository built from them."""
