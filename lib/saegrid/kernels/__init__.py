"""The arithmetic of encoding, decoding and training: `reference` defines it, the others are faster."""
