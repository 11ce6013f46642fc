"""The parts of the study. Each has `measure(lab)`, a dict for JSON, and `section(part)`, what is said of it."""
