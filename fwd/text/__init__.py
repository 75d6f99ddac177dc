"""The text side of the front: tokenizer, chat template, incremental detokenizer, stop strings."""
