"""Text encoders: a file each, which registers under its own name."""
