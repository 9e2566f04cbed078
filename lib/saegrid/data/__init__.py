"""From text and a language model to rows of activations on disk, or to a stream of them.

`corpora` reads texts as documents; `corpora.tokens` tokenizes them, applies the chat template and packs contexts;
`prompts` divides them into training, validation and evaluation; `language_model` runs the model (`models`) up to a
site and on from there; `collect` writes its rows as a store (`store`), whose `manifest` records its origin (`sources`);
`stream` makes training rows while a run trains on them.
"""
