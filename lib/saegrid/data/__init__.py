"""From text and a language model to rows of activations on disk."""
