"""A language model from its files: its config and tokenizer, its layout, and the embedded model."""
