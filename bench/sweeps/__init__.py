"""Many runs of one file: expansion, launching, jobs and their status."""
