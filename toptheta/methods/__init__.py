"""What is kept: a file for each method, compensation, and the parameters of sparse attention.

Every file here that registers a method is found by itself: adding one is adding a file. They are imported
when the registry is first asked, so that flags and their --help wait for no torch.
"""
