"""Weights between this package and Hugging Face directories.

tables.py      one table per family: tensor name, our path, how the axes map; read in both directions
container.py   the safetensors format, one tensor at a time
folder.py      a directory of safetensors, as the five questions that reading asks
gguf.py        a GGUF file, as the same five (beside it: gguf_file, gguf_names, gguf_config, gguf_tokenizer)
read.py        a checkpoint -> parameters, in host memory or sharded over devices
write.py       parameters -> a directory that ``transformers`` loads, complete or not there
convert.py     a checkpoint -> a directory, without the parameters in between
peft.py        LoRA adapters in and out, as PEFT has them
verify.py      two checkpoints, tensor by tensor
hub.py         from and to the Hugging Face Hub
card.py        the README.md of a directory
support.py     the table of models in docs/conversion.md
"""
