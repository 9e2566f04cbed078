"""The small library: what a sparse autoencoder is, how it is trained, and what it costs a language model.

A sparse autoencoder (SAE) writes each row x of activations as a few latents: pre = (x - b_pre) W_encᵀ + b_enc, a code z
that keeps some pre-activations and is 0 elsewhere, and a reconstruction x_hat = z W_dec + b_dec + b_pre. Architectures
differ in what z keeps (`sae`). A training step encodes and decodes a batch, takes an Adam step on the squared error,
and resets the decoder rows to unit norm (`train`; `checkpoint` saves its state). Before training, `row_statistics`
estimates the mean, the scale and the attention-sink direction of the rows; after it, `thresholds` calibrates cuts on
held-out rows. A splice replaces x by x_hat inside the language model and measures its next-token predictions: their KL
divergence from the untouched model's, and the increase of the loss, are the SAE's cost (`splice`). `metrics` defines
each metric once; `evaluation` applies them to a trained SAE. The arithmetic of a step is in `saegrid.kernels`, whose
`reference` is the definition.
"""
