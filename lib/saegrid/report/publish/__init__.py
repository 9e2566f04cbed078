"""The model repository and its card."""
