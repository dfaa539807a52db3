"""Files, log, devices, threads and statistics, which every folder uses (no section in the paper)."""
