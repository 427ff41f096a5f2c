"""The calling side of what is stored: lines of records, one of each on its way, and the answers to commands."""
