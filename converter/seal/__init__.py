"""What makes a folder a checkpoint named OUT."""
