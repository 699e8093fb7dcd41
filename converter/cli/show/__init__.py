"""What the command line prints: plans, progress, summaries."""
