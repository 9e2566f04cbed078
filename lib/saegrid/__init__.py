"""Grid searches of sparse autoencoders on one layer of a language model, and the report on them."""

__version__ = "0.1.0"
