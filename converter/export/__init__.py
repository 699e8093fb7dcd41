"""What a server needs to serve a finished output."""
