"""What a person reads of a campaign: tables, words, the model card."""
