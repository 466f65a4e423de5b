"""Small models trained from scratch, for the quickstart and the pocket tasks: text, tokenizer, training, folder."""
