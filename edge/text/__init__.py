"""Text and token ids: the vocabulary, the tokenizer, and the prompt formats of the models."""
