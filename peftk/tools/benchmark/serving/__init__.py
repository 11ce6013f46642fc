"""`peftk bench --suite serving`: many LoRAs in one batch, beside no adapter, HF PEFT and vLLM."""
