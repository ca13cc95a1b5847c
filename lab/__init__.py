"""What surrounds a run: the command line, progress, files and pictures; no framework by name."""
