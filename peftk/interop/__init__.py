"""Other libraries: HF PEFT checkpoints."""
