"""Models in an MLflow registry: how the server is asked, and a version's files as a folder that can be read."""
