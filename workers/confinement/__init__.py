"""One kernel mechanism a file; each applies its part of the plan and says which step failed."""
