"""Demo models: a corpus, a tokenizer and a trainer that make small checkpoints which print real text."""
