"""The fine-tuning methods: one file per method, with its config and what that does to a model (`plan`)."""
