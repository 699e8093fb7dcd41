"""A repository on the Hugging Face Hub as a folder that can be read."""
