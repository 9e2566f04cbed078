"""From text and a language model to rows of activations on disk.

`corpora` reads texts as documents; `corpora.tokens` tokenizes them, applies the chat template and packs contexts;
`prompts` divides them into training, validation and evaluation; `language_model` gives their residual stream;
`collect` writes it as a store (`store`), whose `manifest` records its origin (`sources`).
"""
