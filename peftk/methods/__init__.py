"""The methods of the field: one file a method, its config with what it does to a model (`plan`)."""
