"""Settings that TRL's trainers have and prepared rows make meaningless."""

TOKENISED = "rows are tokenised before; prepare the tokenizer of the model instead"
