"""What all rooms use: errors, files, the environment, the terminal."""
