"""The methods of the field: one file per method, its config with what it does to a model (`plan`)."""
