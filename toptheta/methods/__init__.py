"""What is kept: a file for each method, compensation, parameters."""
