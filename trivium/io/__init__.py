"""Floor 4: models and adapters in and out: directories, families, safetensors, GGUF, PEFT."""
