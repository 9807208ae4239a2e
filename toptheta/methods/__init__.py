"""Selection: one file per method; also compensation, and the parameters of sparse attention.

Files here that register a method are discovered automatically: to add a method, add a file. They are imported
when the registry is first used, so that flags and --help need not import torch.
"""
