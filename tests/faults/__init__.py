"""What kills, garbage and bad clients do to the command lines; see README.md."""
