"""The handling side of what is stored: records taken apart, run in lanes, and said to be done."""
