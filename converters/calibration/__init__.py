"""Quantisation that looks at what the matrices multiply: kinder activations, and codes that cancel errors."""
