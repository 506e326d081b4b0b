"""GGUF: llama.cpp's one-file format, read by a bounded header reader and decoded block by block in numpy."""
