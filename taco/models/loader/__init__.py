"""Finding a model, reading its configuration, and filling a model with its weights.

source             where the model is, and its configuration files (imports no torch)
checkpoint         the protocol of a checkpoint, and what a model wants from it
safetensors_checkpoint, gguf_checkpoint   the formats
opening            which of them a model has
gguf_file, gguf_config                    the header of a GGUF file, and the configuration in it (import no torch)
apply, dummy       from a checkpoint, or from random values, into the parameters of a model
"""
