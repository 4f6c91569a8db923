"""The names that code bases give the tensors of a Vision Transformer, one file each."""
