"""Weights between this package and Hugging Face directories.

tables.py    one table per family: tensor name, our path, how the axes map; read in both directions
read.py      safetensors -> parameters
gguf.py      a GGUF file as the same: config, tensors under Hugging Face names, tokenizer
write.py     parameters -> a directory that ``transformers`` loads, complete or not there
card.py      the README.md of that directory
"""
