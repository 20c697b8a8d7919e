"""What is read from disk and written to it, and how far a file is trusted."""
