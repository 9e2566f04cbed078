"""The small library: what a sparse autoencoder is, how it is trained, and what it costs a language model.

A sparse autoencoder (SAE) writes each row x of activations as a few latents: pre = (x - b_pre) W_encᵀ + b_enc, a code z
that keeps some pre-activations and is 0 elsewhere, and a reconstruction x_hat = z W_dec + b_dec + b_pre. Architectures
differ in what z keeps (`sae`). A training step encodes and decodes a batch, lowers the squared error by Adam, and sets
the decoder rows back to unit norm (`train`; its state survives a crash through `checkpoint`). Before training, the
rows tell their mean, their scale and the direction of their attention sinks (`row_statistics`); after it, held-out
rows set the thresholds (`thresholds`). A splice puts x_hat in place of x inside the language model and reads the
next-token loss: what it adds is the price of the SAE (`splice`). `metrics` defines every measure once; `evaluation`
applies them to a trained SAE. The arithmetic of a step is in `saegrid.kernels`, whose `reference` is the definition.
"""
